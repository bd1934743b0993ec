"""Attacks on models and results: `best/`, recipes, requests, metrics, events, lists."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
import yaml
from attacks import Box, NotHeld, kind, must_equal
from hostile import DEEP, SCRIPT, TEXTS, VALUES, damaged, damaged_json, damaged_lines, shown
from safetensors.torch import load_file, save_file
from shard_damage import Canary
from world import REQUESTS, recipe_keys, result


def judge_lists(box: Box, run: Path) -> None:
    """Raise NotHeld unless a run is refused, or recommends and evaluates as it did undisturbed."""
    given = ["recommend", "{}", "--file", f"WORLD/{REQUESTS}"]
    if box.dice.random() < 0.25:
        given = ["evaluate", "{}", "--data", "WORLD/data", "--out", "OUT"]
    others = ["exact", "free", "all"] if given[0] == "recommend" else []
    given += ["--decode", box.dice.choice(["exact", "exact", "compact", *others])]
    box.note(f"genrec {given[0]} {' '.join(given[-2:])}")
    expected = result(box.world, *(one.replace("{}", "WORLD/dense") for one in given))
    ended = box.run(*(one.replace("{}", str(run)) for one in given))
    if not ended.refused(run):
        # But for the metrics, which name the recipe: it may be another one.
        must_equal(box.outcome(ended), expected, "lists", but="metrics-test.json")


@kind("models", 60)
def weights(box: Box) -> None:
    """Tensors of `best/` that are missing, no numbers, of another shape, or torn."""
    run = box.copy("dense")
    path = run / "best" / "model.safetensors"
    how = box.dice.randrange(8)
    if how < 3:
        box.damage(path, damaged)
        return judge_lists(box, run)
    tensors = load_file(path)
    name = box.dice.choice(sorted(tensors))
    tensor = tensors[name]
    if how == 3:
        del tensors[name]
        box.note(f"without {name}")
    elif how == 4:
        value = box.dice.choice([float("nan"), float("inf"), 1e38])
        for each in tensors if box.dice.random() < 0.3 else [name]:
            tensors[each] = torch.full_like(tensors[each], value)
        box.note(f"{name} is {value}")
    elif how == 5:
        at = box.dice.randrange(tensor.numel())
        tensor.view(-1)[at] += box.dice.choice([1e-3, 1.0, float("nan")])
        box.note(f"element {at} of {name} is {tensor.view(-1)[at]}")
    elif how == 6:
        tensors[name] = box.dice.choice([tensor[:-1], tensor.double(), tensor[None]]).contiguous()
        box.note(f"{name}: {list(tensor.shape)} becomes {list(tensors[name].shape)}")
    else:
        other = box.dice.choice(sorted(tensors))
        tensors[name] = tensors[other].clone()
        box.note(f"{name} holds {other}")
    save_file(tensors, path, metadata={"format": "pt"})
    judge_lists(box, run)


@kind("models", 50)
def config(box: Box) -> None:
    """A value of `best/config.json`."""
    run = box.copy("dense")
    path = run / "best" / "config.json"
    values = json.loads(path.read_bytes())
    if box.dice.random() < 0.3:
        box.damage(path, damaged_json)
    else:
        key = box.dice.choice([*sorted(values), "auto_map", "_attn_implementation", "num_labels"])
        pool = [*VALUES[:13], "foo", "bert", "no", -7, 10**6, 2, {"AutoConfig": "evil.Config"}]
        values[key] = box.dice.choice(pool)
        box.note(f"{key} = {shown(values[key])}")
        path.write_text(json.dumps(values))
        (run / "best" / "evil.py").write_text("open('canary', 'w')\nclass Config: pass\n")
    judge_lists(box, run)


@kind("models", 40)
def best(box: Box) -> None:
    """Another file of `best/` damaged, missing, or a foreign one beside it."""
    run = box.copy("dense")
    names = sorted(path.name for path in (run / "best").iterdir())
    path = run / "best" / box.dice.choice(names)
    how = box.dice.randrange(8)
    if how == 0:
        path.unlink()
        box.note(f"{path.name} removed")
    elif how == 1:
        canary = Canary(box.folder / "canary")
        foreign = box.dice.choice(["pytorch_model.bin", "training_args.bin", "adapter_model.bin"])
        torch.save({"x": canary}, run / "best" / foreign)
        if box.dice.random() < 0.5:
            (run / "best" / "model.safetensors").unlink()
        box.note(f"an evil {foreign} with {sorted(p.name for p in (run / 'best').iterdir())}")
    elif how == 2:
        torch.save(load_file(run / "best" / "model.safetensors"), run / "best/pytorch_model.bin")
        (run / "best" / "model.safetensors").unlink()
        box.note("pytorch_model.bin in place of model.safetensors")
    else:
        box.damage(path, damaged_json if path.suffix == ".json" else damaged)
    judge_lists(box, run)


@kind("models", 45)
def request(box: Box) -> None:
    """A hostile line among those of `recommend --file`: answered, or refused by file and line."""
    lines = (box.world / REQUESTS).read_bytes().splitlines()
    if box.dice.random() < 0.3:
        hostile = box.dice.choice([*TEXTS[2:], b'{"history": ' + DEEP.encode(), b'{"history": [7'])
        hostile = hostile.replace(b"\n", b" ")
        box.note(f"line 2: {shown(hostile[:60])}")
    else:
        values = {"history": json.loads(lines[0])["history"]}
        key = box.dice.choice(["history", "user", "block", "more", "top"])
        value = box.dice.choice([*VALUES, [None], [[]], [7], [{"a": 1}], ["B1"] * 10**5])
        values[key] = [value] if box.dice.random() < 0.3 else value
        hostile = json.dumps(values).encode()
        box.note(f"line 2: {key} = {shown(values[key])}")
    path = box.folder / "lines.jsonl"
    path.write_bytes(b"\n".join([lines[0], hostile, *lines[1:]]) + b"\n")
    ended = box.run("recommend", "WORLD/dense", "--file", path)
    sound = result(box.world, "recommend", "WORLD/dense", "--file", f"WORLD/{REQUESTS}")
    expected = str(sound["standard output"]).splitlines()
    answers = ended.out.splitlines()
    if ended.refused(path):
        if not re.search(r"jsonl:2: |line 2|position \d", ended.told):
            raise NotHeld(f"does not name the line: {ended.told[:200]}")
        if answers and answers != expected:
            raise NotHeld("the other lines are answered in another way")
    elif [*answers[:1], *answers[-1:]] != [expected[0], expected[-1]]:
        raise NotHeld("the other lines are answered in another way")
    elif len(answers) != len(expected) + bool(hostile.strip()):
        raise NotHeld(f"{len(answers)} answers to {len(expected) + 1} lines")


@kind("models", 45)
def results(box: Box) -> None:
    """A file that a report or a comparison reads."""
    run = box.copy("dense")
    names = ["events.jsonl", "metrics-test.json", "status.json", "audit.json", "recipe.yaml"]
    name = box.dice.choice([*names, "top20-test.parquet", "hybrid.json"])
    path = run / name
    if name == "hybrid.json":
        path.write_text('{"origin": {}, "mixture": {"item_weight": 1.0}, "table": [[1, 2, 3]]}')
    if box.dice.random() < 0.2 and name != "hybrid.json":
        text = path.read_bytes().replace(b"leave-one-out", SCRIPT.encode())
        path.write_bytes(text.replace(b"finished", SCRIPT.encode()).replace(b"step", b"<b>", 1))
        box.note(f"{name}: HTML in it")
    else:
        how = {"events.jsonl": damaged_lines, "top20-test.parquet": damaged}
        box.damage(path, how.get(name, damaged if path.suffix == ".yaml" else damaged_json))
    command = box.dice.choice(
        [["report", run], ["compare", run, "WORLD/knn", "--resamples", "100"]]
        if name != "hybrid.json"
        else [["evaluate", run, "--decode", "hybrid", "--out", "OUT"]]
    )
    box.note(f"genrec {command[0]}")
    if not box.run(*command).refused(run) and command[0] == "report":
        html = (run / "report.html").read_text(encoding="utf-8", errors="surrogateescape")
        if "<script>alert" in html:
            raise NotHeld("a script of a run's file stands in report.html")


YAML = [
    "!!python/object/apply:os.system ['touch canary']",
    "!!python/name:os.system", "&a [*a]", "*nobody", "{", "[" * 5000, "\t- x", "%TAG", "? x", "\x00",
    "a: b: c", "!!binary x", "'", "2026-01-01", "0o17", "0x1F", "1e3", ".nan", "-.inf", "~", "yes",
    "? [1, 2]\n: 3", "<<: {a: 1}", "!!timestamp x", "|\n  x", "\ufeff1",
]  # fmt: skip
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@kind("models", 50)
def recipe(box: Box) -> None:
    """A recipe with another value, key or text: trained by in a dry run, or planned."""
    path = box.folder / "recipe.yaml"
    text = (box.world / "dense.yaml").read_text()
    key = section = ""
    how = box.dice.randrange(4)
    if how == 0:
        box.note("a text")
        path.write_text(text)
        box.damage(path, damaged)
    elif how == 1:
        value = box.dice.choice([*YAML, BOMB])
        section = box.dice.choice(["seed", "decode", "model", "data", "more"])
        box.note(f"{section}: {shown(value)}")
        values = yaml.safe_load(text)
        values.pop(section, None)
        inside = f"{section}:\n  {value}\n" if "\n" in value else f"{section}: {value}\n"
        path.write_text(yaml.safe_dump(values) + (value if value is BOMB else inside))
    else:
        values = yaml.safe_load(text)
        key = box.dice.choice(recipe_keys())
        section, _, name = key.partition(".")
        value = box.dice.choice([value for value in VALUES if value != "\ud800"])
        (values.setdefault(section, {}) if name else values)[name or section] = value
        box.note(f"{key} = {shown(value)}")
        path.write_text(yaml.safe_dump(values))
    command = box.dice.choice([["train", path, "--dry-run"], ["plan", path]])
    box.note(f"genrec {command[0]}")
    place = [section, key.rpartition(".")[2]] if key else ["recipe", section or path, box.world]
    box.run(*command).refused(*place, path)


@kind("models", 30)
def trained(box: Box) -> None:
    """A recipe with one small hostile value, trained by: it ends well or in one line."""
    key = box.dice.choice([key for key in recipe_keys() if "backbone" not in key])
    value = box.dice.choice(["-1", "0", "1", "0.5", "nan", "inf", "1e30", "null", "x", "[]", "3"])
    box.note(f"{key}={value}")
    run = box.folder / "run"
    ended = box.run(
        "train", "WORLD/dense.yaml", "--run", run, "--set", f"{key}={value}", memory=8 << 30
    )
    ended.refused()
    if ended.code and run.exists() and (run / "best").exists():
        missing = {p.name for p in (box.world / "dense" / "best").iterdir()} - {
            p.name for p in (run / "best").iterdir()
        }
        if "model.safetensors" in missing:
            raise NotHeld("best/ is there without a model")
