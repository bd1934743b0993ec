"""The command line: exit codes, one line for each mistake, and nothing half-made under a final
name."""

from __future__ import annotations

import errno
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import forked
import pyarrow.parquet as pq
import pytest
from places import HELPERS
from tiny import TINY_RECIPE
from two_ranks import environment
from typer.main import get_command

from genrec_dist.baselines import leak_audit
from genrec_dist.cli.app import app, run_command
from genrec_dist.console import exit_code_of

LIMITED = HELPERS / "limited.py"
COMMANDS = get_command(app).commands  # type: ignore[attr-defined]
GOOD = "ann a b c d\nbob b c a d\ncy c d b a e\n"


def refused(capfd: pytest.CaptureFixture[str], code: int, arguments: list[Any]) -> str:
    """Run a command that must fail: its exit code, one line on standard error, nothing on standard
    output."""
    assert run_command([str(argument) for argument in arguments]) == code
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("genrec: "), captured.err
    assert captured.err.count("\n") == 1, captured.err
    assert captured.err.endswith("\n")
    return captured.err


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def copy_of(directory: Path, target: Path) -> Path:
    return Path(shutil.copytree(directory, target))


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def recipe_file(folder: Path, **values: object) -> Path:
    lines = "".join(f"{key}: {json.dumps(str(value))}\n" for key, value in values.items())
    return write(folder / "recipe.yaml", lines + TINY_RECIPE)


# Messages.


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("x: damaged\n  at line 3:\tagain", "x: damaged at line 3: again"),
        ("500 secret\x1b[31m\x07, 日本 é", "500 secret\\x1b[31m\\x07, 日本 é"),
        ("\udcff.json: no such file", "\\udcff.json: no such file"),
        (f"{'x' * 1495} {'y' * 9000}{'z' * 500}", f"{'x' * 1495} ... {'z' * 500}"),
    ],
)
def test_a_message_is_one_line_of_bounded_length_without_control_characters(
    capfd: pytest.CaptureFixture[str], message: str, expected: str
) -> None:
    def fail() -> None:
        raise ValueError(message)

    assert exit_code_of(fail) == 1
    assert capfd.readouterr().err == f"genrec: {expected}\n"


# What succeeds.


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_shows_an_example_and_succeeds(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command([name, "--help"]) == 0
    captured = capfd.readouterr()
    assert f"Example: genrec {name}" in captured.out
    assert captured.err == ""


def test_without_a_command_the_commands_are_listed(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command([]) == 0
    listed = capfd.readouterr().out
    assert all(name in listed for name in COMMANDS)


def test_prepare_and_shard_say_what_they_made(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log = write(tmp_path / "log.txt", GOOD)
    assert run_command(["prepare", str(log), "--out", str(tmp_path / "data")]) == 0
    assert "3 users, 5 items, 13 interactions, numbering random" in capfd.readouterr().out
    files = ["audit.json", "dataset.json", "items.parquet", "sequences.parquet", "users.parquet"]
    assert names(tmp_path / "data") == files
    assert run_command(["shard", str(tmp_path / "data")]) == 0
    assert "1 tars, 3 users" in capfd.readouterr().out
    assert names(tmp_path / "data" / "shards") == [
        "lengths.npy",
        "manifest.json",
        "shard-000000.tar",
    ]


def test_data_whose_audit_fails_has_no_name_and_what_was_there_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    log, new = write(tmp_path / "log.txt", GOOD), write(tmp_path / "new.txt", "u9 a b c d\n")
    assert run_command(["prepare", str(log), "--out", str(tmp_path / "old")]) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()}
    room = leak_audit.audit
    capfd.readouterr()

    def full_disk(*arguments: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(leak_audit, "audit", full_disk)
    prepared = ["prepare", log, "--out", tmp_path / "data"]
    appended = ["prepare", "--append", new, "--to", tmp_path / "old"]
    for command in (prepared, appended):
        assert "make room" in refused(capfd, 1, command)
    assert names(tmp_path) == ["log.txt", "new.txt", "old"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()} == before
    monkeypatch.setattr(leak_audit, "audit", room)
    for command in (prepared, appended):
        assert run_command([str(word) for word in command]) == 0
    assert json.loads((tmp_path / "old" / "audit.json").read_text())["users"] == 4


def test_prepare_warns_of_numbers_that_leak(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Numbers by first appearance, users in order: a new item's number tells when it was first
    taken."""
    lines, fresh = [], 1
    for user in range(300):
        new = [str(fresh + n) for n in range(4)]
        fresh += 4
        lines.append(" ".join([f"u{user}", *new]))
    log = write(tmp_path / "log.txt", "\n".join(lines))
    assert (
        run_command(
            ["prepare", str(log), "--out", str(tmp_path / "leaking"), "--numbering", "given"]
        )
        == 0
    )
    said = " ".join(capfd.readouterr().out.split())
    assert "a rule that learns nothing scores HR@5" in said
    assert "use --numbering random" in said
    assert json.loads((tmp_path / "leaking" / "audit.json").read_text())["leaks"] is True
    assert run_command(["prepare", str(log), "--out", str(tmp_path / "random")]) == 0
    said = " ".join(capfd.readouterr().out.split())
    assert "Your log's ids leak: a rule that learns nothing scores HR@5" in said
    assert "The random codes used here: " in said
    assert json.loads((tmp_path / "random" / "audit.json").read_text())["leaks"] is False


def test_overwrite_replaces_what_is_ours(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log, out = write(tmp_path / "log.txt", GOOD), tmp_path / "data"
    assert run_command(["prepare", str(log), "--out", str(out)]) == 0
    before = (out / "users.parquet").read_bytes()
    capfd.readouterr()
    said = refused(capfd, 1, ["prepare", log, "--out", out, "--numbering", "given"])
    assert f"{out} exists" in said
    assert "--overwrite" in said
    assert (out / "users.parquet").read_bytes() == before
    assert (
        run_command(["prepare", str(log), "--out", str(out), "--numbering", "given", "--overwrite"])
        == 0
    )
    assert pq.read_table(out / "users.parquet").column("code").to_pylist() == ["ann", "bob", "cy"]
    assert run_command(["shard", str(out)]) == 0
    capfd.readouterr()
    assert "--overwrite" in refused(capfd, 1, ["shard", out])
    assert run_command(["shard", str(out), "--overwrite"]) == 0
    (tmp_path / "home").mkdir()
    write(tmp_path / "home" / "letters.txt", "dear")
    capfd.readouterr()
    assert "not ours" in refused(
        capfd, 1, ["prepare", log, "--out", tmp_path / "home", "--overwrite"]
    )
    assert names(tmp_path) == ["data", "home", "log.txt"]


def test_recommend_prints_json_lines(tiny_run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    user = pq.read_table(tiny_run / "best" / "users.parquet").column("id")[3].as_py()
    items = pq.read_table(tiny_run / "best" / "items.parquet").column("id").to_pylist()
    assert (
        run_command(
            [
                "recommend",
                str(tiny_run),
                "--history",
                f"{items[0]}, {items[1]},,absent",
                "--top",
                "5",
            ]
        )
        == 0
    )
    captured = capfd.readouterr()
    (line,) = captured.out.splitlines()
    answer = json.loads(line)
    assert len(answer["items"]) == len(answer["scores"]) == 5
    assert set(answer["items"]) <= set(items[2:])
    assert answer["unknown_items"] == ["absent"]
    assert captured.err == "not in the catalogue, skipped: absent\n"
    assert run_command(["recommend", str(tiny_run), "--user", user]) == 0
    answer = json.loads(capfd.readouterr().out)
    assert answer["user"] == user
    assert len(answer["items"]) == 20


def test_recommend_answers_a_file_and_all_users(
    tiny_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    requests = write(
        tmp_path / "requests.jsonl", '{"history": []}\n{"history": ["absent"], "user": "x"}\n'
    )
    assert (
        run_command(
            ["recommend", str(tiny_run), "--file", str(requests), "--exclude-history", "no"]
        )
        == 0
    )
    lines = capfd.readouterr().out.splitlines()
    assert [json.loads(line).get("user") for line in lines] == [None, "x"]
    assert (
        run_command(["recommend", str(tiny_run), "--all-users", "--out", str(tmp_path / "lists")])
        == 0
    )
    assert names(tmp_path / "lists") == ["top20.parquet"]
    assert pq.read_table(tmp_path / "lists" / "top20.parquet").num_rows == 120


def test_evaluate_and_report_write_into_the_run(
    tiny_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = copy_of(tiny_run, tmp_path / "run")
    assert (
        run_command(
            [
                "evaluate",
                str(run),
                "--split",
                "validation",
                "--exclude-history",
                "no",
                "--beam",
                "25",
            ]
        )
        == 0
    )
    said = capfd.readouterr().out
    assert "genrec" in said
    assert "knn" in said
    protocol = json.loads((run / "metrics-validation.json").read_text())["protocol"]
    assert (protocol["exclude_history"], protocol["beam"], protocol["trained_through"]) == (
        False,
        25,
        "n-2",
    )
    assert {"metrics-validation.json", "top20-validation.parquet", "report.html"} <= set(names(run))
    before = (run / "metrics-validation.json").read_bytes()
    beside = tmp_path / "compact"
    assert (
        run_command(
            [
                "evaluate",
                str(run),
                "--split",
                "validation",
                "--decode",
                "compact",
                "--out",
                str(beside),
            ]
        )
        == 0
    )
    assert {"metrics-validation.json", "top20-validation.parquet", "report.html"} == set(
        names(beside)
    )
    assert (
        json.loads((beside / "metrics-validation.json").read_text())["protocol"]["decode"]
        == "compact"
    )
    assert (run / "metrics-validation.json").read_bytes() == before
    (run / "report.html").unlink()
    assert run_command(["report", str(run)]) == 0
    assert (run / "report.html").stat().st_size > 1000


def test_a_dry_run_writes_nothing(
    tiny_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_file(tmp_path, data=tiny_data, run=tmp_path / "run")
    assert run_command(["train", str(recipe), "--dry-run"]) == 0
    assert json.loads(capfd.readouterr().out)["users"] == 120
    assert names(tmp_path) == ["recipe.yaml"]


def test_a_baseline_writes_its_metrics(tiny_data: Path, tmp_path: Path) -> None:
    assert (
        run_command(["baseline", "popularity", str(tiny_data), "--out", str(tmp_path / "out")]) == 0
    )
    assert names(tmp_path / "out") == ["metrics-test.json", "top20-test.parquet"]


# What is refused.


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bogus"], "No such command 'bogus'"),
        (["evaluate"], "Missing"),
        (["evaluate", "run", "--split", "training"], "'training' is not one of"),
        (["evaluate", "run", "--beam", "0"], "--beam"),
        (["evaluate", "run", "--wide"], "--wide"),
        (["prepare", "log.txt"], "--out"),
        (["baseline", "magic", "data", "--out", "x"], "'magic' is not one of"),
        (["recommend", "run"], "give one of --history/--user, --file, --all-users"),
        (["recommend", "run", "--user", "u", "--all-users", "--out", "x"], "give one of"),
        (["recommend", "run", "--all-users"], "--all-users needs --out DIR"),
    ],
)
def test_wrong_usage_is_code_2_and_names_the_help(
    arguments: list[str], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    line = refused(capfd, 2, arguments)
    assert said in line
    command = "genrec" if arguments[0] == "bogus" else f"genrec {arguments[0]}"
    assert line.endswith(f"; see {command} --help\n")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file: check the path"),
        (b"", "empty: expected one user a line"),
        (gzip.compress(GOOD.encode() * 50, mtime=0)[:-20], "the gzip stream is cut off"),
        (GOOD.encode() + b"dot a b\n", ":4: user 'dot' has 2 items, at least 3 are needed"),
        (GOOD.encode() + b"ann a b c\n", ":4: user 'ann' came before in line 1"),
        (b"\x00\x01", "binary"),
    ],
)
def test_a_bad_log_is_named_and_nothing_is_left(
    content: bytes | None, said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log.txt"
    if content is not None:
        log.write_bytes(content)
    line = refused(capfd, 1, ["prepare", log, "--out", tmp_path / "data"])
    assert line.startswith(f"genrec: {log}:")
    assert said in line
    assert names(tmp_path) == ([] if content is None else ["log.txt"])


@pytest.mark.parametrize("option", [["--numbering", "magic"], ["--format", "amazon"]])
def test_a_choice_that_prepare_lacks(
    option: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log = write(tmp_path / "log.txt", GOOD)
    line = refused(capfd, 1, ["prepare", log, "--out", tmp_path / "data", *option])
    assert option[1] in line
    assert "use" in line or "choose" in line
    assert names(tmp_path) == ["log.txt"]


def test_recipes_that_do_not_fit(
    tiny_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_file(tmp_path, data=tiny_data, run=tmp_path / "run")
    for arguments, said in (
        (
            ["absent"],
            "absent: no such recipe file; shipped recipes: auto, best, codes, demo",
        ),
        (
            [recipe, "--set", "model.d_modle=8"],
            "unknown key model.d_modle; did you mean `model.d_m",
        ),
        ([recipe, "--set", "model.d_model=wide"], "model.d_model: 'wide' is not a whole number"),
        ([recipe, "--set", "seed"], "--set seed: write it as dotted.key=value"),
        (
            [recipe, "--set", f"data={tmp_path / 'absent'}"],
            "give a data directory made by `genrec prepare`",
        ),
        (
            [recipe, "--set", f"shards={tmp_path / 'absent'}"],
            "give a directory made by `genrec shard`",
        ),
        ([recipe, "--resume", "latest"], "holds no checkpoint; start without --resume"),
        ([recipe, "--resume", str(tmp_path)], "not a checkpoint directory"),
    ):
        assert said in refused(capfd, 1, ["train", *arguments]), arguments
        assert not (tmp_path / "run").exists(), arguments


def test_one_flipped_byte_of_a_shard_is_found(
    tiny_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shards = copy_of(tiny_data / "shards", tmp_path / "shards")
    tar = shards / "shard-000001.tar"
    damaged = bytearray(tar.read_bytes())
    damaged[1700] ^= 1
    tar.write_bytes(damaged)
    recipe = recipe_file(tmp_path, data=tiny_data, shards=shards, run=tmp_path / "run")
    line = refused(capfd, 1, ["train", recipe])
    assert line.startswith(f"genrec: {tar}: sha256 ")
    assert "shard again" in line
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_trained_over(tiny_run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    line = refused(capfd, 1, ["train", tiny_run / "recipe.yaml"])
    assert f"{tiny_run}: a run is there already: continue it with --resume latest" in line


def test_runs_that_cannot_be_decoded(
    tiny_run: Path, tiny_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = copy_of(tiny_run, tmp_path / "run")
    commands = (["evaluate", run], ["recommend", run, "--history", "a"])
    assert "no recipe.yaml in it" in refused(capfd, 1, ["evaluate", tmp_path / "absent"])
    assert "no best/ in it" in refused(
        capfd, 1, ["recommend", tmp_path / "absent", "--history", "a"]
    )
    wanted = "give the directory of a run, as of genrec train or genrec baseline"
    for path, what in ((tmp_path / "absent", "no such directory"), (run / "recipe.yaml", "a file")):
        assert f"{path}: {what}: {wanted}" in refused(capfd, 1, ["report", path])
    whole = (run / "best" / "model.safetensors").read_bytes()
    for damage in (whole[:-100], whole[:40], b""):
        (run / "best" / "model.safetensors").write_bytes(damage)
        for command in commands:
            line = refused(capfd, 1, command)
            assert f"{run / 'best' / 'model.safetensors'}: damaged or changed" in line
    (run / "best" / "model.safetensors").write_bytes(whole)
    for name in ("items.parquet", "tokenizer.json", "config.json"):
        kept = (run / "best" / name).read_bytes()
        (run / "best" / name).write_bytes(kept[: len(kept) // 2])
        assert str(run / "best") in refused(capfd, 1, commands[1]), name
        (run / "best" / name).write_bytes(kept)
    shutil.rmtree(run / "best")
    for command in commands:
        assert f"{run}: no best/ in it: the run's status is 'finished'" in refused(
            capfd, 1, command
        )
    assert not list(run.glob("*-test.*"))


def test_data_that_the_run_does_not_know(
    tiny_run: Path, tiny_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, other = copy_of(tiny_run, tmp_path / "run"), tmp_path / "data"
    before = names(run)
    assert (
        run_command(
            ["prepare", str(tiny_data.parent / "log.txt"), "--out", str(other), "--seed", "5"]
        )
        == 0
    )
    capfd.readouterr()
    for command in (["evaluate", run], ["recommend", run, "--user", "user-3"],
                    ["recommend", run, "--all-users", "--out", tmp_path / "lists"]):  # fmt: skip
        line = refused(capfd, 1, [*command, "--data", other])
        assert "give --data the directory the run was trained on" in line
        assert "dataset.json: no such file" in refused(
            capfd, 1, [*command, "--data", tmp_path / "absent"]
        )
    assert "user 'nobody' is not in" in refused(capfd, 1, ["recommend", run, "--user", "nobody"])
    assert names(run) == before
    assert not (tmp_path / "lists").exists()


def test_a_bad_request_file(
    tiny_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "requests.jsonl", '\n{"history": 5}\n')
    assert f"{file}:2: not a request (no list of items as history): write" in refused(
        capfd, 1, ["recommend", tiny_run, "--file", file]
    )
    assert "no such file" in refused(
        capfd, 1, ["recommend", tiny_run, "--file", tmp_path / "absent"]
    )


def test_the_good_lines_of_a_request_file_are_answered(
    tiny_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    good, deep = '{"history": [], "user": "user-3"}', "[" * 200_000
    bad = ['{"history": %s' % deep, '{"history": [%s]}' % ("9" * 5000), '{"history": ["\\ud800"]}']  # noqa: UP031
    bad += ['{"history": ["a"], "block": [NaN]}', deep]
    lines = [good, *(line for text in bad for line in (text, good))]
    file = write(tmp_path / "requests.jsonl", "\n".join(lines))
    assert run_command(["recommend", str(tiny_run), "--file", str(file)]) == 1
    captured = capfd.readouterr()
    assert captured.err == (
        f"genrec: {file}:2: not a request (nested more than 100 deep): write "
        '{"history": ["item", ...], "user": "optional"}; 4 lines more are none; the 6 others are '
        "answered\n"
    )
    answers = [json.loads(line) for line in captured.out.splitlines()]
    assert [answer["user"] for answer in answers] == ["user-3"] * 6
    assert len({tuple(answer["items"]) for answer in answers}) == 1
    for number, text in enumerate(bad):
        file.write_text(f"\n\n{text}\n")
        said = refused(capfd, 1, ["recommend", tiny_run, "--file", file])
        assert f"{file}:3: not a request (" in said, number
        assert len(said) < 400, number


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a": ' * 200_000, '{"status": NaN}', "\ud800"])
def test_files_of_a_run_from_elsewhere(
    tiny_data: Path, tiny_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], text: str
) -> None:
    content = text.encode("utf-8", "surrogatepass")
    run, data = copy_of(tiny_run, tmp_path / "run"), copy_of(tiny_data, tmp_path / "data")

    def spoil(path: Path) -> str:
        path.write_bytes(content)
        return path.name

    for name in ("status.json", "events.jsonl", "metrics-test.json", "audit.json"):
        spoil(run / name)
    assert run_command(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    for words in ("status.json: not JSON", "metrics-test.json: not JSON", "1 torn line skipped"):
        assert words in page, words
    capfd.readouterr()
    assert "metrics-test.json: not a metrics file" in refused(capfd, 1, ["compare", run, run])
    name = spoil(run / "hybrid.json")
    hybrid = ["evaluate", run, "--decode", "hybrid", "--split", "validation"]
    assert f"{name}: not readable (" in refused(capfd, 1, hybrid)
    state = next(iter((run / "checkpoints").iterdir())) / "state.json"
    name = spoil(state)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text((run / "recipe.yaml").read_text())
    again = ["train", recipe, "--set", f"run={run}", "--resume", state.parent]
    assert f"{name}: not JSON (" in refused(capfd, 1, again)
    spoil(run / "recipe.yaml")
    assert "recipe.yaml: " in refused(capfd, 1, ["train", run / "recipe.yaml"])
    assert "recipe.yaml: " in refused(capfd, 1, ["tune", run / "recipe.yaml"])
    spoil(data / "dataset.json")
    assert "dataset.json: not a dataset.json" in refused(capfd, 1, ["shard", data])


def test_paths_are_shown_as_they_were_given(
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in (["shard"], ["train", "tiny", "--run", "r", "--data"]):
        said = refused(capfd, 1, [*command, "s3://bucket/data"])
        assert said.startswith("genrec: s3://bucket/data/dataset.json: no such file: a data dir")
    log = write(tmp_path / "log.csv", "user,item,time\n")
    there = "genrec: log.csv: a file is there, not a directory: choose another name"
    for command in (
        ["train", "tiny", "--data", tiny_data, "--run", "log.csv"],
        ["baseline", "popularity", tiny_data, "--out", "log.csv"],
    ):
        assert refused(capfd, 1, command).startswith(there), command
    assert log.read_text() == "user,item,time\n"
    space = "base: tiny\nset: {data: data}\nspace: {finetune.learning_rate: {choice: [0.1]}}\n"
    write(tmp_path / "space.yaml", space)
    tune = ["tune", "space.yaml", "--out", "sweep"]
    assert refused(capfd, 1, tune).startswith("genrec: data/dataset.json: no such file")
    copy_of(tiny_data, tmp_path / "data")
    (tmp_path / "sweep").mkdir()
    write(tmp_path / "sweep" / "sweep.json", "{}")
    assert refused(capfd, 1, tune).startswith("genrec: sweep: a sweep is there already")
    tune[3] = str(tmp_path / "sweep")
    assert refused(capfd, 1, tune).startswith(f"genrec: {tmp_path}/sweep: a sweep is there")


def test_an_output_that_is_a_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = write(tmp_path / "log.txt", GOOD)
    assert "choose another output" in refused(capfd, 1, ["prepare", log, "--out", log])
    line = refused(capfd, 1, ["prepare", log, "--out", log / "inside"])
    assert str(log) in line
    assert log.read_text() == GOOD


# The same from outside: real processes.


def genrec(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "genrec_dist.cli", *map(str, arguments)]
    return subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=120, **options
    )


def limit_files(size: int) -> Any:
    def apply() -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return apply


def test_a_process_returns_the_codes(tmp_path: Path) -> None:
    log = write(tmp_path / "log.txt", GOOD)
    done = genrec("prepare", log, "--out", tmp_path / "data")
    assert (done.returncode, done.stderr) == (0, "")
    done = genrec("prepare", log, "--out", tmp_path / "data")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert genrec("prepare").returncode == 2


def test_an_output_without_rights(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Root may write everywhere but into the kernel's own directories, which refuse any new
    file."""
    log = write(tmp_path / "log.txt", GOOD)
    shut = tmp_path / "shut"
    shut.mkdir(mode=0o555)
    out = Path("/proc/genrec") if os.access(shut, os.W_OK) else shut / "data"
    line = refused(capfd, 1, ["prepare", log, "--out", out])
    assert str(out) in line
    assert (
        "change its rights or choose another place" in line
        or "no such file or directory: check the path" in line
    )
    assert names(shut) == []


@pytest.mark.parametrize("size", [100, 3000])
def test_a_full_disk_while_preparing(tmp_path: Path, size: int) -> None:
    lines = [" ".join([f"user{n}", *(f"i{n * 7 + k}" for k in range(9))]) for n in range(500)]
    log = write(tmp_path / "log.txt", "\n".join(lines))
    done = genrec("prepare", log, "--out", tmp_path / "data", preexec_fn=limit_files(size))
    assert_disk_is_full(done, tmp_path / "data")
    assert names(tmp_path) == ["log.txt"]


def test_a_full_disk_while_sharding(tiny_data: Path, tmp_path: Path) -> None:
    done = genrec("shard", tiny_data, "--out", tmp_path / "shards", preexec_fn=limit_files(3000))
    assert_disk_is_full(done, tmp_path / "shards")
    assert names(tmp_path) == []


def test_a_full_disk_while_evaluating(tiny_run: Path, tmp_path: Path) -> None:
    run = copy_of(tiny_run, tmp_path / "run")
    before = names(run)
    done = forked.run([LIMITED, "1000", "evaluate", run], environment(), timeout=120)
    assert_disk_is_full(done, run)
    assert names(run) == before


def assert_disk_is_full(done: subprocess.CompletedProcess[str], place: Path) -> None:
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1, done.stderr
    assert str(place.parent) in done.stderr
    assert place.name in done.stderr
    assert "file too large: raise the limit (ulimit -f)" in done.stderr


def test_an_interrupt_is_130(tmp_path: Path) -> None:
    script = (
        "import signal, sys, genrec_dist.cli.app as cli, genrec_dist.baselines.leak_audit as "
        "audit\n"
        # A job in the background inherits SIGINT ignored; a person at a terminal does not.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "audit.audit = lambda *_: signal.raise_signal(signal.SIGINT)\n"
        "sys.exit(cli.run_command(sys.argv[1:]))"
    )
    log = write(tmp_path / "log.txt", GOOD)
    command = [sys.executable, "-c", script, "prepare", str(log), "--out", str(tmp_path / "data")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 128 + signal.SIGINT
    assert "Traceback" not in done.stderr
