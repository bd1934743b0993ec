"""Training beside Hugging Face's Trainer and the published collate: real tokens a second, in turn,
each in a process of its own."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from genrec_shards.dataset import load_dataset

from genrec_dist.bench.measure import REPEATS, Claim, median, table
from genrec_dist.bench.stream import make_data
from genrec_dist.bench.train_process import OURS as WAYS
from genrec_dist.bench.train_process import PEERS, Setting
from genrec_dist.data.tokenizer import train_tokenizer
from genrec_dist.data.word_table import build_words

OURS, TRIMMED, PADDED, *_ = WAYS
TUNED, DEFAULT, PUBLISHED = PEERS
LONG, CAPPED, SWITCHES = "512 tokens", "20 items", "512 tokens, one switch"
CAPPED_ITEMS = 20
SLOW_STEPS = 8
"""Steps of a turn of those who need many times as long; their batches are drawn at random, so any
few of them are alike."""
GOALS = {LONG: {TUNED: 1.5, DEFAULT: 5.0, PUBLISHED: 8.0}, CAPPED: {TUNED: 1.25}, SWITCHES: {}}


@dataclass(frozen=True)
class Sizes:
    """What is measured; smaller ones are for tests."""

    users: int = 22_363
    """Of the synthetic data that stands in where none is given."""
    items: int = 12_101
    setting: Setting = field(default_factory=lambda: Setting(""))
    repeats: int = REPEATS
    rivals: tuple[str, ...] = (OURS, TRIMMED, *PEERS)
    ways: tuple[str, ...] = tuple(WAYS)
    """Of ours, beside each other."""


def bench_train(
    data: Path | None = None, sizes: Sizes | None = None
) -> tuple[list[Claim], dict[str, Any]]:
    """All of it. `data`: a directory of `genrec prepare`, or None for synthetic data of Beauty's
    size."""
    sizes = sizes or Sizes()
    with tempfile.TemporaryDirectory(prefix="genrec-bench-") as temporary:
        path = data or make_data(Path(temporary) / "made", sizes.users, sizes.items).path
        settings = {
            LONG: replace(sizes.setting, data=str(path)),
            CAPPED: replace(
                sizes.setting,
                data=str(path),
                max_tokens=_tokens_of(CAPPED_ITEMS, path, sizes.setting),
            ),
        }
        settings[SWITCHES] = settings[LONG]
        measured = {
            name: _measure(setting, sizes.ways if name == SWITCHES else sizes.rivals, sizes.repeats)
            for name, setting in settings.items()
        }
    claims = [claim for name, found in measured.items() for claim in _claims(name, found)]
    more = {
        "measured": measured,
        "settings": {name: asdict(setting) for name, setting in settings.items()},
    }
    return claims, table("train", claims, repeats=sizes.repeats, **more)


def _tokens_of(num_items: int, data: Path, setting: Setting) -> int:
    """The longest text of so many items."""
    numbering = load_dataset(data).numbering
    tokenizer = train_tokenizer(numbering.item_codes, setting.tokenizer, 1)
    words = build_words(tokenizer, numbering.item_codes, numbering.user_codes, 1)
    return 3 + words.longest_user + num_items * words.longest_item


def _measure(setting: Setting, names: Sequence[str], repeats: int) -> dict[str, dict[str, Any]]:
    """Rival -> facts, tokens a second and seconds of each turn."""
    with contextlib.ExitStack() as stack:
        # Started one after another: each makes its world and, the compiled one, its code, when
        # nobody is timed.
        rivals = {name: stack.enter_context(_process(name, setting)) for name in names}
        facts = {name: rival.answer() for name, rival in rivals.items()}
        first = next(iter(facts.values()))
        for name, fact in facts.items():
            assert fact["samples"] == first["samples"], (name, fact, first)
            assert fact["tokens"] == first["tokens"], (name, fact, first)
            if name != TRIMMED:  # whose softmax knows fewer tokens
                assert abs(fact["first loss"] - first["first loss"]) < 1e-3, (name, fact, first)
        steps = -(-setting.samples // setting.batch_size)
        turns: dict[str, list[dict[str, float]]] = {name: [] for name in rivals}
        for turn in range(repeats + 1):
            for name, rival in rivals.items():
                told = rival.ask(min(steps, SLOW_STEPS) if name in (DEFAULT, PUBLISHED) else steps)
                if turn:
                    turns[name].append(told)
    return {
        name: {
            **facts[name],
            "tokens a second": median([turn["tokens"] / turn["seconds"] for turn in turns[name]]),
            "of each turn": [round(turn["tokens"] / turn["seconds"], 1) for turn in turns[name]],
            "seconds of a turn": median([turn["seconds"] for turn in turns[name]]),
            "peak memory, GiB": max(turn["memory"] for turn in turns[name]) / 2**30,
        }
        for name in rivals
    }


class Process:
    """A rival that waits for its turn."""

    def __init__(self, process: subprocess.Popen[str], name: str, errors: Path):
        self.process, self.name, self.errors = process, name, errors

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise ValueError(
                f"{self.name}: ended by itself: {self.errors.read_text(encoding='utf-8')[-2000:]}"
            )
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, num_steps: int) -> dict[str, Any]:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # its last words are told by `answer`
            self.process.stdin.write(f"{num_steps}\n")
            self.process.stdin.flush()
        return self.answer()


@contextlib.contextmanager
def _process(name: str, setting: Setting) -> Iterator[Process]:
    command = [
        sys.executable,
        "-m",
        "genrec_dist.bench.train_process",
        name,
        json.dumps(asdict(setting)),
    ]
    with tempfile.NamedTemporaryFile("w+", suffix=".log") as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            encoding="utf-8",
        )
        try:
            yield Process(process, name, Path(errors.name))
        finally:
            process.kill()
            process.communicate()


def _claims(setting: str, measured: Mapping[str, Mapping[str, Any]]) -> list[Claim]:
    claims = []
    ours = measured[OURS]["tokens a second"]
    for peer, found in measured.items():
        if peer == OURS:
            continue
        theirs, goal = found["tokens a second"], GOALS[setting].get(peer)
        told, holds = ("none", True) if goal is None else (f">= {goal:g}x", ours >= goal * theirs)
        claims.append(
            Claim(
                f"training, {setting}",
                peer,
                ours,
                theirs,
                "real tokens/s",
                ours / theirs,
                told,
                holds,
            )
        )
    return claims


def format_rivals(table: Mapping[str, Any]) -> str:
    """Tokens a second, padding and memory of all: plain lines."""
    lines: list[str] = []
    for setting, measured in table["measured"].items():
        rows: Sequence[tuple[str, Mapping[str, Any]]] = sorted(
            measured.items(), key=lambda pair: -pair[1]["tokens a second"]
        )
        lines.append(f"{setting}, {rows[0][1]['samples']:,} samples:")
        lines += [
            f"  {name:18} {found['tokens a second']:10,.0f} tokens/s  padding {found['padding share']:6.1%}  "
            f"{found['peak memory, GiB']:5.2f} GiB"
            for name, found in rows
        ]
    return "\n".join(lines)
