"""A model that reads titles, from its recipe to lists: the commands, a resume to the bit, and what is
refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from genrec_shards.dataset import load_dataset
from genrec_shards.histories import sample_users
from genrec_shards.prepare import prepare
from genrec_shards.storage.write import write_shards
from run_events import events
from safetensors.torch import load_file, save_file
from titled_data import RECIPE, titled_data
from transformers import AutoModelForCausalLM, AutoTokenizer

from genrec_dist.cli.app import run_command
from genrec_dist.config.load import load_recipe
from genrec_dist.config.recipe import Recipe
from genrec_dist.data.encoder_input import encode_histories
from genrec_dist.data.prompt.title_words import distinct_titles
from genrec_dist.inference.load import load_run
from genrec_dist.inference.rank_users import Decoding, rank_batch
from genrec_dist.inference.recommend import Recommender
from genrec_dist.inference.titles import prompt_of
from genrec_dist.sharing.public_files import write_public_files
from genrec_dist.training.checkpoint import list_checkpoints
from genrec_dist.training.run import train
from genrec_dist.training.setup import build_setup


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return titled_data(tmp_path_factory.mktemp("titles"))


def recipe_in(folder: Path, data: Path, *sets: str, name: str = "run") -> Recipe:
    path = folder / f"{name}.yaml"
    path.write_text(RECIPE.format(data=data, run=folder / name), encoding="utf-8")
    return load_recipe(path, list(sets))


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run. Read only."""
    return train(recipe_in(tmp_path_factory.mktemp("run"), data))


def test_training_lowers_the_loss_of_answers(run: Path) -> None:
    losses = [event["loss"] for event in events(run, "step")]
    assert losses[-1] < 0.8 * losses[0]
    steps = events(run, "step")
    assert sum(event["samples"] for event in steps) == 2 * 90
    assert events(run, "start")[0]["flops_formula"].startswith(
        "3 x 2 x [(inputs + targets) x N x w"
    )


def test_free_beams_count_what_is_no_title(run: Path, data: Path, tmp_path: Path) -> None:
    options = ["--decode", "free", "--users", "20", "--seed", "3", "--data", str(data)]
    assert run_command(["evaluate", str(run), "--out", str(tmp_path), *options]) == 0
    metrics = json.loads((tmp_path / "metrics-test.json").read_text())
    assert metrics["protocol"]["users"] == {"sample": 20, "seed": 3}
    assert (metrics["users"], metrics["protocol"]["decode"]) == (20, "free")
    lists = pq.read_table(tmp_path / "top20-test.parquet").to_pylist()
    listed = [item for row in lists for item in row["items"]]
    assert 0 < listed.count(None) < len(listed)
    assert metrics["invalid_rate"] == pytest.approx(listed.count(None) / len(listed))
    # Users of the sample as `sample_users` draws them, and titles at their own probability.
    dataset, loaded = load_dataset(data), load_run(run)
    view = dataset.sequences.history_and_target("test")
    rows = view.users[sample_users(len(view.users), 20, 3)]
    assert [row["user"] for row in lists] == [dataset.sequences.user_ids[row] for row in rows]
    everything = Decoding(mode="all", top=64, exclude_history=False)
    scores = rank_batch(loaded.searcher, loaded.layout, view, rows, everything)
    for user, row in enumerate(lists):
        logp = dict(zip(scores.items[user].tolist(), scores.scores[user].tolist(), strict=True))
        for item, score in zip(row["items"], row["scores"], strict=True):
            if item is not None:
                assert score == pytest.approx(
                    logp[dataset.sequences.item_ids.index(item)], abs=1e-4
                )


def test_a_backbone_is_listed_as_it_is(run: Path, data: Path, tmp_path: Path) -> None:
    sets = [f"model.backbone={run / 'best'}", "finetune.epochs=0"]
    untrained = train(recipe_in(tmp_path, data, *sets))
    before, after = (load_file(path / "best" / "model.safetensors") for path in (run, untrained))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert run_command(["evaluate", str(untrained), "--split", "test", "--users", "5"]) == 0
    metrics = json.loads((untrained / "metrics-test.json").read_text())
    assert metrics["training"] == {"status": "finished", "step": 0}
    with pytest.raises(ValueError, match="nothing to train, and only the backbone of a prompt"):
        recipe_in(tmp_path, data, "finetune.epochs=0", name="fresh")


def test_commands_answer_from_a_run(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    assert run_command(["evaluate", str(copy), "--split", "test", "--data", str(data)]) == 0
    metrics = json.loads((copy / "metrics-test.json").read_text())
    assert metrics["users"] == 90
    assert set(metrics["beside"]) == {"counting", "popularity", "knn"}
    lists = pq.read_table(copy / "top20-test.parquet").to_pylist()
    dataset = load_dataset(data)
    view = dataset.sequences.history_and_target("test")
    for row, user in enumerate(lists):
        history = view.items[view.starts[row] : view.ends[row]]
        assert len(set(user["items"])) == 20
        assert not {dataset.sequences.item_ids[item] for item in history} & set(user["items"])
    capsys.readouterr()
    assert (
        run_command(["recommend", str(copy), "--user", "7", "--titles", "--data", str(data)]) == 0
    )
    shown = capsys.readouterr().out
    assert shown.startswith("user 7 of ")
    titles = dict(zip(dataset.sequences.item_ids, dataset.descriptions.titles, strict=True))
    assert sum(title in shown for title in titles.values()) >= 10
    other = tmp_path / "other"
    shutil.copytree(copy, other)
    assert run_command(["compare", str(copy), str(other), "--split", "test"]) == 0


def test_what_a_push_uploads_lists_the_same_titles(run: Path, tmp_path: Path) -> None:
    write_public_files(run, tmp_path)
    ours, copy = Recommender.load(run), Recommender.load(tmp_path)
    history = ours.run.catalogue.item_ids[:7]
    assert copy.recommend([history])[0] == ours.recommend([history])[0]
    names = {path.suffix for path in tmp_path.iterdir()}
    assert names == {".json", ".safetensors", ".yaml"}


def test_titles_come_with_the_end_of_the_prompt_as_the_model_read_it(
    run: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = load_dataset(data)
    ids, titles = dataset.sequences.item_ids, distinct_titles(dataset.descriptions.titles)
    loaded, chosen = load_run(run), [4, 5, 9, 11, 7, 2, 3]
    latest = "\n".join(titles[item] for item in chosen[-5:])  # max_titles of the recipe
    assert prompt_of(loaded, [ids[item] for item in chosen]) == f"Seen:\n{latest}\nNext:\n"
    assert prompt_of(loaded, []) == "Seen:\n\nNext:\n"
    # Titles are the model's own: no --data.
    ask = ["recommend", str(run), "--history", ",".join(ids[item] for item in chosen), "--top", "3"]
    assert run_command(ask) == 0
    answer = json.loads(capsys.readouterr().out)
    assert run_command([*ask, "--titles"]) == 0
    lines = capsys.readouterr().out.splitlines()
    read = [f"    | {line}" for line in ("Seen:", *latest.split("\n"), "Next:")]
    assert lines[:9] == ["a history of 7 items", "the end of the prompt:", *read]
    for place, line in enumerate(lines[9:12]):
        number, probability, item, title = line.split(maxsplit=3)
        assert (number, item) == (str(place + 1), answer["items"][place])
        assert title == titles[ids.index(item)]
        assert float(probability) == pytest.approx(np.exp(answer["scores"][place]), abs=6e-6)


def test_best_is_a_language_model_of_its_own(run: Path, data: Path) -> None:
    """What `transformers` loads from `best/` gives the answers' probabilities that we rank by."""
    loaded, best = load_run(run), run / "best"
    lm = AutoModelForCausalLM.from_pretrained(best, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(best)
    items = np.array([3, 1, 4], np.int32)
    encoder = encode_histories(items, np.array([0, 3]), np.array([-1]), loaded.layout)
    found = loaded.searcher.search(encoder, beam=20, top=5)
    titles = load_dataset(data).descriptions.titles
    prompt = "Seen:\n" + "\n".join(titles[item] for item in items) + "\nNext:\n"
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    for item, score in zip(found.items[0], found.scores[0], strict=True):
        answer = [*tokenizer(titles[item])["input_ids"], tokenizer.eos_token_id]
        with torch.inference_mode():
            logits = lm(torch.tensor([prompt_ids + answer])).logits[0, len(prompt_ids) - 1 : -1]
        logp = float(logits.log_softmax(-1)[torch.arange(len(answer)), answer].sum())
        assert logp == pytest.approx(score, abs=2e-4)


LORA = ("lora.rank=4", "lora.dropout=0.1")


@pytest.mark.parametrize("sets", [(), LORA], ids=["all weights", "adapters"])
def test_a_resumed_run_is_the_same_to_the_bit(
    run: Path, data: Path, tmp_path: Path, sets: tuple[str, ...]
) -> None:
    if sets:
        run = train(recipe_in(tmp_path, data, *sets, name="unbroken"))
    broken = tmp_path / "run"
    shutil.copytree(run, broken)
    (broken / "events.jsonl").unlink()
    for path in list_checkpoints(broken)[1:]:
        shutil.rmtree(path)
    shutil.rmtree(broken / "best")
    assert train(recipe_in(tmp_path, data, *sets), resume="latest") == broken
    last = list_checkpoints(run)[-1].name
    adapter = ["best/adapter/adapter_model"] * bool(sets)
    for name in ("checkpoints/" + last + "/rank-00000-of-00001", "best/model", *adapter):
        ours, theirs = (load_file(place / f"{name}.safetensors") for place in (broken, run))
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            assert torch.equal(ours[key], tensor), key


def test_other_titles_are_refused_by_a_resume(run: Path, tmp_path: Path, data: Path) -> None:
    lines = (data.parent / "items.csv").read_text().splitlines()
    (tmp_path / "items.csv").write_text("\n".join([*lines[:-1], lines[-1] + " again"]))
    dataset = prepare(data.parent / "log.txt", tmp_path / "data", items=tmp_path / "items.csv")
    write_shards(dataset, tmp_path / "data" / "shards", users_per_shard=32, users_per_record=16)
    shutil.copytree(run, tmp_path / "run")
    with pytest.raises(ValueError, match="its titles is not this run's"):
        train(recipe_in(tmp_path, tmp_path / "data"), resume="latest")


def test_data_without_titles_is_refused_in_one_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = prepare(data.parent / "log.txt", tmp_path / "data")
    write_shards(dataset, tmp_path / "data" / "shards", users_per_shard=32, users_per_record=16)
    recipe_in(tmp_path, tmp_path / "data")
    assert run_command(["train", str(tmp_path / "run.yaml")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "its items have no titles, which a prompt is made of: make it once more with" in line


def test_backbone_weights_are_loaded_and_checked(run: Path, data: Path, tmp_path: Path) -> None:
    """`best/` of a run is a language model, so it can be a backbone."""
    backbone = f"model.backbone={run / 'best'}"
    recipe = recipe_in(tmp_path, data, backbone)
    model = build_setup(recipe)[1]
    expected = load_file(run / "best" / "model.safetensors")
    for name, tensor in model.lm.state_dict().items():
        assert torch.equal(tensor, expected.get(name, expected["model.embed_tokens.weight"])), name
    with pytest.raises(
        ValueError, match=r"model\.max_tokens 300: with the longest answer \d+ positions"
    ):
        build_setup(recipe_in(tmp_path, data, backbone, "model.max_tokens=300"))
    bare = tmp_path / "bare"
    shutil.copytree(run / "best", bare)
    (bare / "model.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"neither a directory with config.json and model.safetensors"
    ):
        build_setup(recipe_in(tmp_path, data, f"model.backbone={bare}"))
    fields = json.loads((bare / "config.json").read_text())
    (bare / "config.json").write_text(
        json.dumps({**fields, "model_type": "mistral", "sliding_window": 8})
    )
    with pytest.raises(ValueError, match="a mistral model; one whose layers are decoders"):
        build_setup(recipe_in(tmp_path, data, f"model.backbone={bare}"))
    four_bits = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (bare / "config.json").write_text(json.dumps({**fields, "quantization_config": four_bits}))
    with pytest.raises(ValueError, match=r"its weights are quantised \(bitsandbytes\)"):
        build_setup(recipe_in(tmp_path, data, f"model.backbone={bare}"))


def test_adapters_go_with_their_backbone_alone(run: Path, data: Path, tmp_path: Path) -> None:
    """Its weights are in no checkpoint."""
    backbone = tmp_path / "backbone"
    shutil.copytree(run / "best", backbone)
    recipe = recipe_in(tmp_path, data, *LORA, f"model.backbone={backbone}", "finetune.epochs=1")
    train(recipe)
    weights = load_file(backbone / "model.safetensors")
    weights["model.norm.weight"] += 1e-3
    save_file(weights, backbone / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"its backbone is not this run's"):
        train(recipe, resume="latest")


def test_damaged_prompt_files_are_named(run: Path, tmp_path: Path) -> None:
    for change, message in (
        ({"max_titles": "many"}, "max_titles is 'many'"),
        ({"colour": 1}, "colour is unknown"),
        ({"format_version": 9}, "not of format 1"),
    ):
        copy = tmp_path / next(iter(change))
        shutil.copytree(run / "best", copy / "best")
        (copy / "best" / "manifest.json").unlink()  # whose hash would be found wrong before
        path = copy / "best" / "prompt.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        with pytest.raises(ValueError, match=message):
            load_run(copy)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["prompt.template=Seen"], r"prompt\.template: write text, {history} once, and text after it"),
        (["prompt.separator=''"], r"prompt\.separator: it is empty"),
        (["pretrain.epochs=1"], r"pretrain\.targets mask: a causal model sees nothing after a mask"),
        (["model.item_loss=1.0"], r"model\.item_loss: a model with a prompt cannot have it"),
        (["tokens.trim=true"], r"tokens\.trim: a model with a prompt cannot have it"),
        (["tokens.vocab_size=auto"], r"tokens\.vocab_size: a model with a prompt cannot have it"),
        (["init_from=runs/x"], r"init_from: a model with a prompt cannot have it"),
        (["prompt.template=''", "finetune.targets=last", "lora.rank=4"], r"lora\.rank: adapters need a model with a prompt"),
    ],
)  # fmt: skip
def test_recipes_that_no_prompted_run_can_have(
    data: Path, tmp_path: Path, sets: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        recipe_in(tmp_path, data, *sets)
