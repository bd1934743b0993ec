"""Runs on the hub, against a server on loopback: what goes up, what comes down, what is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from genrec_shards.dataset import load_dataset
from hub_server import Hub, hub_server
from huggingface_hub import constants
from safetensors import safe_open
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
from two_ranks import environment

import genrec_dist
from genrec_dist.cli.app import run_command
from genrec_dist.config.hub import HubName, parse_hub_name, run_folder
from genrec_dist.inference.evaluate import evaluate
from genrec_dist.inference.load import load_run
from genrec_dist.inference.rank_users import Decoding
from genrec_dist.inference.recommend import Recommender, Request
from genrec_dist.sharing.card import About, model_card
from genrec_dist.sharing.public_files import write_public_files

NAME = "me/beauty"
PLACE = f"hf://{NAME}"
AUDIT = "Your log's ids show no leak."


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """The library reads its settings when it is imported, which in this process is over."""
    from huggingface_hub.utils import _http

    with hub_server() as server:
        set_endpoint(monkeypatch, server.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
        monkeypatch.setenv("HF_TOKEN", server.token)
        yield server


@pytest.fixture(scope="module")
def run(tiny_run: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with user ids and with results, in a place whose name is known."""
    folder = tmp_path_factory.mktemp("secret-place") / "run"
    ignored = shutil.ignore_patterns("checkpoints", "tensorboard")
    shutil.copytree(tiny_run, folder, ignore=ignored)
    loaded = load_run(folder)
    evaluate(loaded, load_dataset(tiny_data), "test", decoding=Decoding())
    (folder / "audit.json").write_text(json.dumps({"sentence": AUDIT}), encoding="utf-8")
    return folder


def set_endpoint(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    template = url + constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", url)


def push(run: Path, *more: str) -> int:
    return run_command(["push", str(run), "--to", NAME, *more])


def large_puts(hub: Hub) -> list[str]:
    return hub.sent("PUT", "/store/")


def test_a_pushed_run_recommends_what_it_recommended(hub: Hub, run: Path) -> None:
    assert push(run, "--license", "mit", "--dataset", "A log", "--dataset-license", "none") == 0
    files = hub.files(NAME)
    assert {"README.md", "config.json", "model.safetensors", "items.json", "recipe.yaml"} <= {
        *files
    }
    ours, theirs = Recommender.load(run), Recommender.load(PLACE)
    items = ours.run.catalogue.item_ids
    requests = [Request(items[start : start + 9]) for start in range(0, 45, 3)]
    for mine, other in zip(ours.recommend(requests), theirs.recommend(requests), strict=True):
        assert mine.items == other.items
        assert mine.scores == pytest.approx(other.scores, abs=1e-5)
    assert theirs.run.catalogue.user_ids == []
    # A user is unknown to the copy.
    known = Request(items[:5], "user-3")
    assert theirs.recommend([known])[0].items == ours.recommend([items[:5]])[0].items


def test_plain_transformers_loads_what_was_pushed(hub: Hub, run: Path) -> None:
    assert push(run) == 0
    model = AutoModelForSeq2SeqLM.from_pretrained(NAME)
    assert type(model) is genrec_dist.GenRecForConditionalGeneration
    assert model.config.num_users == 0
    assert AutoTokenizer.from_pretrained(NAME).mask_token == "<mask>"


def test_no_user_no_data_and_no_path_goes_up(
    hub: Hub, run: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """Planted: each user's id, the places of run and data, and those of a tokenizer, a text model,
    an origin and a backbone."""
    planted = tmp_path / "planted"
    shutil.copytree(run, planted)
    recipe = (planted / "recipe.yaml").read_text()
    secret = tmp_path / "secret-place"
    (secret / "words").mkdir(parents=True)
    for key in ("shards", "init_from", "backbone", "tokenizer"):
        recipe = re.sub(rf"\b{key}: null", f"{key}: {secret}/{key}", recipe)
    recipe = recipe.replace("text: words", f"text: {secret}/words")
    assert recipe.count("secret-place/") >= 5
    (planted / "recipe.yaml").write_text(recipe)
    config = json.loads((planted / "best" / "config.json").read_text())
    config["_name_or_path"] = f"{secret}/backbone"
    (planted / "best" / "config.json").write_text(json.dumps(config))
    (planted / "best" / "manifest.json").unlink()  # it has the hash of the old one
    mixture = {"item_weight": 1.0, "text": {"weight": 1.0, "source": f"{secret}/words"}}
    (planted / "hybrid.json").write_text(json.dumps({"origin": {}, "mixture": mixture}))
    assert push(planted) == 0
    uploaded = b"\0".join(hub.bodies)
    assert b"BART" not in uploaded  # so that what follows does not pass on compressed bytes
    assert json.dumps("model.safetensors").encode() in uploaded
    for user in load_dataset(tiny_data).sequences.user_ids:
        assert not re.search(rf"\b{user}\b".encode(), uploaded), user
    for place in ("secret-place", str(tiny_data), str(planted), "recipe.yaml.", "events"):
        assert place.encode() not in uploaded, place
    assert {name.rpartition(".")[2] for name in hub.files(NAME)} == {
        "gitattributes", "json", "md", "safetensors", "yaml",
    }  # fmt: skip
    with safe_open(run_folder(PLACE) / "model.safetensors", "pt") as weights:
        assert not [name for name in weights.keys() if "user" in name]  # noqa: SIM118


def test_everything_arrives_in_one_commit_and_an_interrupted_push_goes_on(
    hub: Hub, run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.fault = lambda method, path: "cut" if "/commit/" in path else None
    assert push(run) == 1
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith(f"genrec: {PLACE}: ")
    assert "try again" in said
    assert [*hub.files(NAME)] == [".gitattributes"]
    assert len(large_puts(hub)) == 1
    hub.fault = lambda method, path: None
    assert push(run) == 0
    assert len(large_puts(hub)) == 1  # found by its hash
    assert len(hub.commits[NAME, "main"]) == 2
    assert push(run) == 0
    assert len(hub.commits[NAME, "main"]) == 2  # nothing new


def test_busy_and_broken_answers_to_a_push(
    hub: Hub, run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    failures = iter(["503", "cut", "503"])
    hub.fault = lambda method, path: next(failures, None) if method == "PUT" else None
    assert push(run) == 0
    assert len(large_puts(hub)) == 4
    assert "model.safetensors" in hub.files(NAME)
    hub.fault = lambda method, path: "503" if "/preupload/" in path else None
    capfd.readouterr()
    assert push(run) == 1
    assert capfd.readouterr().err.count("\n") == 1


def test_the_token_is_of_the_environment_and_is_not_printed(
    hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert push(run) == 1
    monkeypatch.delenv("HF_TOKEN")
    assert push(run) == 1
    out, err = capfd.readouterr()
    assert "set HF_TOKEN in the environment" in err
    assert "hf_" not in out + err
    assert not hub.repos
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert push(run, "--private") == 0
    assert hub.repos == {NAME: True}
    assert run_folder(PLACE).is_dir()
    monkeypatch.delenv("HF_TOKEN")
    assert run_command(["recommend", "hf://me/other", "--history", "a"]) == 1
    assert "no such model" in capfd.readouterr().err


def test_a_branch_and_files_of_an_earlier_push(hub: Hub, run: Path) -> None:
    assert run_command(["push", str(run), "--to", f"{PLACE}@v2"]) == 0
    assert [*hub.files(NAME)] == [".gitattributes"]
    files = hub.commits[NAME, "v2"][-1]
    files |= {"hybrid.json": b"{}", "notes.txt": b"mine", "more/notes.json": b"{}"}
    assert run_command(["push", str(run), "--to", f"{NAME}@v2", "--license", "mit"]) == 0
    assert {"notes.txt", "more/notes.json"} <= {*hub.files(NAME, "v2")}
    assert "hybrid.json" not in hub.files(NAME, "v2")
    commit = hub.head(NAME, "v2")
    assert run_folder(f"{PLACE}@v2") == run_folder(f"{PLACE}@{commit}")


def test_a_download_is_verified_resumed_and_kept(
    hub: Hub, run: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert push(run) == 0

    def once(fault: str) -> None:
        left = [fault]
        hub.fault = lambda method, path: (
            left.pop() if left and method == "GET" and path.endswith("model.safetensors") else None
        )

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)
    once("cut")
    folder = run_folder(PLACE)
    ranges = [
        r for verb, path, r in hub.requests if verb == "GET" and path.endswith("model.safetensors")
    ]
    assert ranges[0] is None
    assert re.fullmatch(r"bytes=[1-9]\d*-", ranges[1])
    # Bytes that changed on the way, or in the cache, are loaded once more.
    weights = (folder / "model.safetensors").resolve()
    whole = weights.read_bytes()
    weights.write_bytes(b"\0" + whole[1:])
    once("503")
    assert (run_folder(PLACE) / "model.safetensors").read_bytes() == whole
    # Without a network the cache is read.
    url = hub.url
    set_endpoint(monkeypatch, "http://127.0.0.1:9")
    assert run_folder(PLACE) == folder
    with pytest.raises(ValueError, match="me/none: the hub cannot be reached"):
        run_folder("hf://me/none")
    set_endpoint(monkeypatch, url)
    shutil.rmtree(folder.parent.parent)
    hub.fault = lambda method, path: "wrong bytes" if path.endswith("items.json") else None
    with pytest.raises(ValueError, match=r"items\.json has arrived damaged twice"):
        run_folder(PLACE)


def test_no_pickle_and_no_foreign_repository_is_loaded(hub: Hub, run: Path) -> None:
    assert push(run) == 0
    files = hub.commits[NAME, "main"][-1]
    files["pytorch_model.bin"] = b"pickle"
    run_folder(PLACE)
    assert not hub.sent("GET", "pytorch_model.bin")
    for bad in ("pytorch_model.bin", "../config.json", "sub/config.json"):
        manifest = json.loads(files["manifest.json"])
        manifest["sha256"] = {"config.json": "0", bad: "0"}
        hub.commits[NAME, "main"].append(files | {"manifest.json": json.dumps(manifest).encode()})
        with pytest.raises(ValueError, match="no file of a pushed run"):
            run_folder(PLACE)
        assert not hub.sent("GET", "pytorch_model.bin")
    hub.commits[NAME, "main"].append({"config.json": b"{}", "pytorch_model.bin": b"pickle"})
    with pytest.raises(ValueError, match="genrec push did not put it there"):
        run_folder(PLACE)
    with pytest.raises(ValueError, match="no such branch, tag or commit"):
        run_folder(f"{PLACE}@none")


def test_a_copy_keeps_no_results_and_says_what_needs_the_data(
    hub: Hub, run: Path, tiny_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert push(run) == 0
    folder = run_folder(PLACE)
    before = sorted(folder.iterdir())
    with_data = ["--data", str(tiny_data)]
    out = tmp_path / "results"
    for command in (
        ["evaluate", PLACE, "--decode", "hybrid", "--out", str(out), *with_data],
        ["recommend", PLACE, "--decode", "hybrid", "--history", "a", *with_data],
    ):
        assert run_command(command) == 1
        assert "no weights of hybrid were chosen before this run was" in capfd.readouterr().err
    for command in (
        ["evaluate", PLACE, *with_data],
        ["evaluate", PLACE],
        ["recommend", PLACE, "--decode", "hybrid", "--history", "a"],
    ):
        assert run_command(command) == 1
    said = capfd.readouterr().err.splitlines()
    assert [line.rpartition(": ")[2][:20] for line in said] == [
        "give another directory for them (--out)"[:20],
        "give --data DIR, or, to list by the model alone"[:20],
        "give --data DIR, or, to list by the model alone"[:20],
    ]
    assert run_command(["report", str(folder)]) == 1
    assert sorted(folder.iterdir()) == before
    assert run_command(["evaluate", PLACE, "--data", str(tiny_data), "--out", str(out)]) == 0
    assert (out / "metrics-test.json").is_file()
    assert run_command(["push", PLACE, "--to", "me/copy"]) == 1


def test_a_run_starts_from_a_pushed_one(hub: Hub, run: Path, tiny_recipe: Path) -> None:
    assert push(run) == 0
    assert (
        run_command(["train", str(tiny_recipe), "--from", PLACE, "--set", "model.user_ids=false"])
        == 0
    )
    events = (tiny_recipe.parent / "run" / "events.jsonl").read_text().splitlines()
    assert json.loads(events[0])["begun_from"]["path"] == PLACE


def test_the_card_is_written_from_the_run(run: Path) -> None:
    name = HubName("me/beauty")
    about = About("mit", "A made-up log", "CC0")
    card = model_card(run, name, about)
    metrics = json.loads((run / "metrics-test.json").read_text())
    low, high = metrics["ci95"]["NDCG@10"]
    shown = f"{metrics['NDCG@10']:.4f} [{low:.4f}, {high:.4f}]".replace("0.", ".")
    assert f"| {shown} |" in card
    assert "| co-occurrence kNN | " in card
    assert "| popularity | " in card
    for part in (
        "license: mit", "- data: A made-up log", "- licence of the data: CC0", f"- audit: {AUDIT}",
        'Recommender.load("hf://me/beauty")', 'AutoModelForSeq2SeqLM.from_pretrained("me/beauty")',
        "120 users, 64 items", "no table of users", "| numbering | random |",
    ):  # fmt: skip
        assert part in card, part
    assert "license: other" in model_card(run, name, About())


def test_what_is_no_name_is_refused(capfd: pytest.CaptureFixture[str], run: Path) -> None:
    assert parse_hub_name("hf:/me/beauty@a/b") == HubName("me/beauty", "a/b")
    for name in ("beauty", "hf://me", "me/beauty/more", "https://hub/me/beauty"):
        assert run_command(["push", str(run), "--to", name]) == 2
        assert "hf://owner/name[@revision]" in capfd.readouterr().err


def test_a_damaged_model_is_not_pushed(hub: Hub, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    config = tmp_path / "run" / "best" / "items.parquet"
    config.write_bytes(config.read_bytes()[:-1])
    assert push(tmp_path / "run") == 1
    assert not hub.repos
    with pytest.raises(ValueError, match="directory of `genrec train`"):
        write_public_files(tmp_path / "run" / "best", tmp_path)


@pytest.mark.parametrize("decode", ["exact", "hybrid"])
def test_the_command_that_push_ends_with_can_be_run(
    decode: str, hub: Hub, run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        re.sub(r"(?m)^decode: \w+$", f"decode: {decode}", recipe.read_text("utf-8")), "utf-8"
    )
    assert f"decode: {decode}\n" in recipe.read_text("utf-8")
    assert push(folder) == 0
    captured = capfd.readouterr()
    said = (captured.out + captured.err).splitlines()[-1]
    command = said.partition("anyone who may read it: genrec ")[2]
    item = load_run(folder).catalogue.item_ids[0]
    assert run_command(command.replace("...", item).split()) == 0


def test_the_commands_take_the_endpoint_and_the_cache_from_the_environment(
    run: Path, tmp_path: Path
) -> None:
    """Processes of their own, that read the environment as users' do."""
    item = load_run(run).catalogue.item_ids[0]
    with hub_server() as hub:
        env = environment(HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "home"), HF_TOKEN=hub.token)
        env.pop("HF_HUB_OFFLINE", None)
        command = [sys.executable, "-m", "genrec_dist.cli"]

        def done(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [*command, *arguments], env=env | more, capture_output=True, text=True, timeout=120
            )

        pushed = done("push", str(run), "--to", NAME)
        assert pushed.returncode == 0, pushed.stderr
        first = done("recommend", PLACE, "--history", item)
        assert first.returncode == 0, first.stderr
    again = done("recommend", PLACE, "--history", item, HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    assert again.stdout == first.stdout
    assert hub.token not in pushed.stdout + pushed.stderr + first.stderr
    assert os.listdir(tmp_path / "home") == ["hub"] or "hub" in os.listdir(tmp_path / "home")
