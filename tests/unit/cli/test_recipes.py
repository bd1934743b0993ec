"""The commands that need no torch: shipped files, what was meant, and what is refused early."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from places import ROOT
from two_ranks import environment

from genrec_dist.cli.app import run_command
from genrec_dist.config.load import load_recipe, shipped_recipes
from genrec_dist.config.meanings import meanings
from genrec_dist.config.shipped import find_shipped, first_comment, shipped_files
from genrec_dist.config.suggest import did_you_mean

LAUNCH = ROOT / "launch"


def said(capfd: pytest.CaptureFixture[str], code: int, *arguments: object) -> str:
    """What a command prints: on standard error where it is refused."""
    assert run_command([str(argument) for argument in arguments]) == code
    captured = capfd.readouterr()
    assert not (captured.out if code else captured.err)
    return captured.err if code else captured.out


def test_every_key_of_a_recipe_has_a_meaning() -> None:
    without = [key for key, meaning in meanings().items() if not meaning.text]
    assert without == []


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_printed_recipe_is_the_recipe(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    printed = said(capfd, 0, "recipes", name)
    (tmp_path / "mine.yaml").write_text(printed, encoding="utf-8")
    assert load_recipe(tmp_path / "mine.yaml") == load_recipe(name)


def test_a_recipe_is_shown_with_or_without_the_word(capfd: pytest.CaptureFixture[str]) -> None:
    assert said(capfd, 0, "recipes", "show", "best") == said(capfd, 0, "recipes", "best")
    assert "give one recipe" in said(capfd, 2, "recipes", "best", "tiny")
    assert "give one recipe" in said(capfd, 2, "recipes", "show", "best", "tiny")


def test_a_printed_recipe_has_each_key_below_its_meaning(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # What a run alone knows may be missing.
    (tmp_path / "mine.yaml").write_text("# Mine.\nfinetune: {epochs: 1}\n", encoding="utf-8")
    printed = said(capfd, 0, "recipes", tmp_path / "mine.yaml")
    assert printed.startswith("# Mine.\n\n# Directory of `genrec prepare`.\ndata: data/mine\n")
    for lines in (
        "  # Peak learning rate. Allowed: above 0.\n  learning_rate: 0.001\n",
        "\n# Tokenizer and output vocabulary.\ntokens:\n",
        "    # span: longest span. multi: number of targets. Allowed: 1 or above.\n    k: 4\n",
        "Allowed: true, false.\n  scale_embedding: false\n",
        "Allowed: a name, null.\ninit_from: null\n",
    ):
        assert lines in printed, lines
    assert all(len(line) <= 100 for line in printed.splitlines())


def test_recipes_and_launch_files_are_listed(capfd: pytest.CaptureFixture[str]) -> None:
    listed = said(capfd, 0, "recipes")
    assert [line.split()[0] for line in listed.splitlines() if line[0] != " "] == shipped_recipes()
    listed = said(capfd, 0, "launch-file")
    names = [line.split()[0] for line in listed.splitlines() if line[0] != " "]
    files = {str(path.relative_to(LAUNCH)) for path in LAUNCH.rglob("*") if path.is_file()}
    assert set(names) == files - {"README.md"}


def test_a_launch_file_is_printed_with_what_it_needs(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(["launch-file", "gpu_node_8_zero2"]) == 0
    captured = capfd.readouterr()
    assert captured.out == (LAUNCH / "gpu_node_8_zero2.yaml").read_text()
    needed = "genrec launch-file zero2.json > launch/zero2.json"
    assert captured.err == f"gpu_node_8_zero2.yaml names launch/zero2.json: {needed}\n"
    assert said(capfd, 0, "launch-file", "zero2") == (LAUNCH / "zero2.json").read_text()


def test_a_shipped_file_is_found_by_any_of_its_names_that_is_its_alone() -> None:
    for name in ("slurm/one_node.sbatch", "slurm/one_node", "one_node.sbatch", "one_node"):
        assert find_shipped(LAUNCH, name, "launch file") == LAUNCH / "slurm" / "one_node.sbatch"
    with pytest.raises(ValueError, match=r"give cpu_two_ranks_zero.sh or cpu_two_ranks_zero.yaml"):
        find_shipped(LAUNCH, "cpu_two_ranks_zero", "launch file")
    assert "README.md" not in shipped_files(LAUNCH)
    assert first_comment(LAUNCH / "cpu_two_ranks.sh").startswith("Two gloo processes on this CPU")
    assert first_comment(LAUNCH / "zero2.json") == ""


@pytest.mark.parametrize(
    ("code", "arguments", "words"),
    [
        (1, ["train", "bset"], "bset: no such recipe file; did you mean `best`? shipped recipes"),
        (1, ["train", "best", "--set", "finetune.lerning_rate=1"], "mean `finetune.learning_rate`"),
        (1, ["train", "best", "--set", "learning_rate=1"], "mean `pretrain.learning_rate` or `fin"),
        (1, ["train", "best", "--set", "finetune.lr=1"], "did you mean `finetune.learning_rate`"),
        (1, ["train", "best", "--set", "xyz=1"], "unknown key xyz; known here: data, run, init"),
        (1, ["train", "best", "--set", "packing=pack"], "packed, padded; did you mean `packed`?"),
        (1, ["launch-file", "gpu_nodes"], "no such launch file; did you mean `gpu_node_8`"),
        (2, ["trian", "best"], "No such command 'trian'. Did you mean 'train'?"),
        (2, ["evaluate", "run", "--split", "tets"], "'validation', 'test'.; did you mean `test`?"),
        (2, ["train", "best", "--data", "a", "--set", "data=b"], "--data and --set data=..."),
        (1, ["train", "best", "--data", "2026"], "2026/dataset.json: no such file: give a data"),
    ],
)  # fmt: skip
def test_what_was_meant_is_asked(
    code: int, arguments: list[str], words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    line = said(capfd, code, *arguments)
    assert words in line
    assert line.count("\n") == 1


def test_a_word_that_is_near_nothing_gets_no_question() -> None:
    assert did_you_mean("quux", ["model.d_model", "seed"]) == ""
    assert did_you_mean("m", ["model", "mask"]) == ""


def test_data_and_run_are_short_for_set(
    tiny_data: Path, tiny_run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    line = said(capfd, 1, "train", "tiny", "--data", tiny_data, "--run", tiny_run)
    assert line.startswith(f"genrec: {tiny_run}: a run is there already")


def test_version_and_short_help(capfd: pytest.CaptureFixture[str]) -> None:
    assert said(capfd, 0, "--version") == f"genrec-dist {version('genrec-dist')}\n"
    assert "Example: genrec shard" in said(capfd, 0, "shard", "-h")


def test_the_shell_completes_commands_and_shipped_names() -> None:
    for words, expected in (
        ("genrec rec", {"recipes", "recommend"}),
        ("genrec train pap", {"paper-base", "paper-large", "paper-tiny"}),
        ("genrec launch-file gpu_si", {"gpu_single_3090.yaml"}),
        ("genrec tune ", {"beauty", "smoke"}),
    ):
        asked = {"_GENREC_COMPLETE": "complete_bash", "COMP_WORDS": words}
        place = {"COMP_CWORD": str(words.count(" "))}
        done = subprocess.run(
            [sys.executable, "-m", "genrec_dist.cli"], env=environment(**asked, **place),
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert set(done.stdout.split()) == expected, words


def test_mistakes_are_found_before_torch_is_imported(tmp_path: Path) -> None:
    empty = str(tmp_path)
    commands = [
        ["train", "nope"],
        ["train", "best", "--set", "model.d_modle=1"],
        ["train", "best", "--data", empty],
        ["train", "best", "--dry-run", "--data", empty],
        ["evaluate", empty],
        ["evaluate", empty, "--data", empty],
        ["recommend", empty, "--history", "a"],
        ["report", empty],
        ["recipes"],
        ["recipes", "best"],
        ["launch-file", "gpu_node_8"],
        ["--version"],
        ["train", "--help"],
    ]
    code = f"""
import sys
from genrec_dist.cli.app import run_command
for arguments in {commands!r}:
    run_command(arguments)
    heavy = {{"torch", "transformers", "scipy", "polars", "pandas"}} & sys.modules.keys()
    assert not heavy, (arguments, heavy)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 8, done.stderr
    assert all(line.startswith("genrec: ") for line in lines)


def test_a_sign_of_life_is_on_terminals_of_the_first_rank_alone() -> None:
    code = "from genrec_dist.console import working\nwith working():\n    print('done')"
    for rank, expected in (("0", True), ("1", False)):
        leader, follower = pty.openpty()
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment(TERM="xterm") | {"RANK": rank},
            stdout=subprocess.PIPE, stderr=follower, timeout=60, check=True,
        )  # fmt: skip
        os.write(follower, b"end")
        assert (b"loading torch" in os.read(leader, 4096)) == expected
        assert done.stdout == b"done\n"
        for end in (leader, follower):
            os.close(end)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(FORCE_COLOR="1"),
        capture_output=True, timeout=60, check=True,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == (b"done\n", b"")


def test_a_space_is_found_by_its_name() -> None:
    from genrec_tuning.space import load_space

    spaces = ROOT / "tuning" / "spaces"
    assert load_space("smoke") == load_space(spaces / "smoke.yaml")
    with pytest.raises(ValueError, match=r"beuty: no such space file; did you mean `beauty`\?"):
        load_space("beuty")
    assert yaml.safe_load((spaces / "beauty.yaml").read_text())["base"] in shipped_recipes()
