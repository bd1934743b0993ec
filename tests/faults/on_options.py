"""Attacks on the command line: every option of every command with values that nobody means."""

from __future__ import annotations

from dataclasses import asdict
from functools import cache
from typing import Any

from attacks import Box, NotHeld, kind
from hostile import SCRIPT, shown
from typer.main import get_command
from world import REQUESTS, recipe_keys

from genrec_dist.data.item_graph import KnnSettings

NUMBERS = [
    "-1", "0", "1", "1000000000", "1" + "0" * 30, "-1" + "0" * 30, "nan", "inf", "-inf", "1e400",
    "0x10", "", " ", "\u0661\u0662", "1_000", "3.7", "x" * 10_000, "\udcff", "1;ls", "--", "9" * 5000,
]  # fmt: skip
TEXTS = [
    "", " ", "/", "/dev/null", "/dev/full", "/proc/self/mem", ".", "..", "~", "-", "--", "x" * 5000,
    "\udcff", "a\nb", "\x1b[31mred", "a,b,c", ",", "=", "a=", "=b", "a.b.c=1", "seed=1=2", "WORLD",
    "WORLD/dense", "WORLD/data", "WORLD/log.txt", "OUT/a/b/c", "file:///etc/passwd", "s3://",
    "http://127.0.0.1:1/x", "pipe:touch canary", "$(touch canary)", SCRIPT, "latest", "2014-02-30",
    "2014-01-01,2013-01-01", "WORLD/log.txt/x", "\u65e5\u672c", "%s%n", "{}", "[1,2", "!!python/x",
]  # fmt: skip
SOUND: dict[str, list[str]] = {
    "prepare": ["WORLD/log.txt", "--out", "OUT"],
    "shard": ["WORLD/data", "--out", "OUT"],
    "recipes": ["auto"],
    "launch-file": ["gpu_node_8_zero2"],
    "train": ["WORLD/dense.yaml", "--dry-run"],
    "evaluate": ["WORLD/dense", "--out", "OUT"],
    "recommend": ["WORLD/dense", "--file", f"WORLD/{REQUESTS}"],
    "baseline": ["popularity", "WORLD/data", "--out", "OUT"],
    "compare": ["WORLD/dense", "WORLD/knn", "--resamples", "100"],
    "report": ["WORLD/knn"],
    "plan": ["WORLD/dense.yaml"],
    # What runs for minutes is refused in any case.
    "demo": ["--set", "no.such.key=1"],
    "tune": ["WORLD/no-such-space.yaml", "--out", "OUT"],
    "reproduce": ["beauty", "--data", "WORLD/no-such-file", "--out", "OUT"],
}
"""A call of each command that is sound but for the option that is attacked."""


@cache
def options() -> list[tuple[str, Any]]:
    """(command, parameter) of all commands but for `bench`, which takes no values but paths."""
    commands = get_command(app()).commands  # type: ignore[attr-defined]
    return [
        (name, parameter)
        for name, command in sorted(commands.items())
        if name in SOUND
        for parameter in command.params
        if parameter.name != "help" and not getattr(parameter, "is_flag", False)
    ]


def app() -> Any:
    from genrec_dist.cli.app import app as genrec

    return genrec


def is_number(parameter: Any) -> bool:
    """Whether a parameter is a number, of any range."""
    return parameter.bare_type in (int, float)


@kind("options", 170)
def value(box: Box) -> None:
    """One option, or argument, of one command with a hostile value."""
    name, parameter = box.dice.choice(options())
    pool = NUMBERS if is_number(parameter) else [*TEXTS, box.dice.choice(NUMBERS)]
    given = box.dice.choice(pool)
    sound = SOUND[name]
    option = parameter.opts[0]
    if not option.startswith("--"):
        has_argument = bool(sound) and not sound[0].startswith("--")
        command = [given, *sound[has_argument:]]
    elif option in sound:
        at = sound.index(option)
        command = [*sound[:at], option, given, *sound[at + 2 :]]
    else:
        command = [*sound, option, given]
    box.note(f"genrec {name} {option} {shown(given)}")
    # Without rights, so that no path of this machine is in danger.
    ended = box.run(name, *command, nobody=True)
    if ended.refused():
        return
    if given == "nan" and is_number(parameter):
        raise NotHeld(f"{option} nan is accepted")


@kind("options", 40)
def setting(box: Box) -> None:
    """A key of `--set` with a hostile value, in a command that computes something with it."""
    dry = ["WORLD/dense.yaml", "--dry-run"]
    command, keys = box.dice.choice(
        [
            (["baseline", "knn", "WORLD/data", "--out", "OUT"], [*asdict(KnnSettings()), "more"]),
            (["train", *dry], recipe_keys()),
            (["plan", "WORLD/dense.yaml"], recipe_keys()),
        ]
    )
    key, given = box.dice.choice(keys), box.dice.choice([*NUMBERS, "null", "[]", "{a: 1}", "yes"])
    box.note(f"genrec {command[0]} --set {key}={shown(given)}")
    if not box.run(*command, "--set", f"{key}={given}", nobody=True).refused() and given == "nan":
        raise NotHeld(f"{key}=nan is accepted")
