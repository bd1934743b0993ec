"""A T5 from its recipe to lists: the commands, a resume to the bit, a backbone with T5's own
tokenizer, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from run_events import events
from safetensors.torch import load_file
from tiny import NUM_USERS, TINY_RECIPE
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSeq2SeqLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from genrec_dist.cli.app import run_command
from genrec_dist.config.load import load_recipe
from genrec_dist.data.encoder_input import encode_histories
from genrec_dist.inference.load import load_run
from genrec_dist.model.seq2seq.t5 import GenRecT5ForConditionalGeneration
from genrec_dist.training.checkpoint import list_checkpoints
from genrec_dist.training.run import train
from genrec_dist.training.setup import build_setup

T5 = ("model.architecture=t5", "checkpoint_every=3", "keep_checkpoints=99")


@pytest.fixture(scope="module")
def run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with both stages and the item head. Read only."""
    folder = tmp_path_factory.mktemp("t5")
    (folder / "recipe.yaml").write_text(f"data: {tiny_data}\nrun: {folder / 'run'}\n{TINY_RECIPE}")
    return train(load_recipe(folder / "recipe.yaml", [*T5, "model.item_loss=0.5"]))


def test_training_takes_padded_batches_and_lowers_the_loss(run: Path) -> None:
    steps = events(run, "step")
    assert any(step["padding_share"] > 0 for step in steps)
    losses = [step["loss"] for step in steps if step["stage"] == "finetune"]
    assert losses[-1] < losses[0]
    assert steps[0]["tflops_per_second"] > 0


def test_commands_answer_from_a_run(
    run: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    assert run_command(["evaluate", str(copy), "--split", "test", "--beam", "64"]) == 0
    exact = pq.read_table(copy / "top20-test.parquet")
    assert json.loads((copy / "metrics-test.json").read_text())["users"] == NUM_USERS
    assert run_command(["evaluate", str(copy), "--split", "test", "--decode", "all"]) == 0
    every = pq.read_table(copy / "top20-test.parquet")
    assert exact["items"].to_pylist() == every["items"].to_pylist()
    for decode in ("items", "hybrid", "free"):
        assert run_command(["evaluate", str(copy), "--decode", decode]) == 0, decode
    capsys.readouterr()
    assert run_command(["recommend", str(copy), "--user", "user-3", "--top", "5"]) == 0
    listed = json.loads(capsys.readouterr().out)["items"]
    assert len(set(listed)) == 5


def test_a_resumed_run_is_the_same_to_the_bit(run: Path, tmp_path: Path) -> None:
    broken = tmp_path / "run"
    shutil.copytree(run, broken)
    (broken / "events.jsonl").unlink()
    _, *later = list_checkpoints(broken)
    assert later
    for path in later:
        shutil.rmtree(path)
    shutil.rmtree(broken / "best")
    recipe = load_recipe(broken / "recipe.yaml", [f"run={broken}"])
    assert train(recipe, resume="latest") == broken
    last = list_checkpoints(run)[-1].name
    for name in (f"checkpoints/{last}/rank-00000-of-00001", "best/model"):
        ours, theirs = (load_file(place / f"{name}.safetensors") for place in (broken, run))
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            assert torch.equal(ours[key], tensor), key


def test_best_is_loaded_by_transformers(run: Path) -> None:
    """Its `generate` gives the scores that we rank by."""
    loaded = load_run(run)
    model = AutoModelForSeq2SeqLM.from_pretrained(run / "best")
    assert isinstance(model, GenRecT5ForConditionalGeneration)
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    encoder = encode_histories(
        np.array([3, 1, 4], np.int32), np.array([0, 3]), np.array([2]), loaded.layout
    )
    found = loaded.searcher.search(encoder, beam=20, top=3)
    arrays, offsets = loaded.words.tokens_of_items()
    config = model.config
    for item, score in zip(found.items[0], found.scores[0], strict=True):
        answer = [*arrays[offsets[item] : offsets[item + 1]].tolist(), config.eos_token_id]
        output = model.generate(
            input_ids=encoder.input_ids,
            attention_mask=encoder.attention_mask,
            user_rows=encoder.user_rows,
            item_rows=encoder.item_rows,
            prefix_allowed_tokens_fn=lambda _, tokens, a=answer: [a[len(tokens) - 1]],
            max_new_tokens=len(answer),
            output_logits=True,
            return_dict_in_generate=True,
        )
        logits = torch.stack(output.logits, 1)[0]
        logp = float(logits.log_softmax(-1)[torch.arange(len(answer)), answer].sum())
        assert logp == pytest.approx(score, abs=1e-4)


def t5_tokenizer(folder: Path) -> None:
    """With T5's kinds of pieces, special tokens and spaces; it has neither a mask nor `<s>`."""
    letters = [f"{n}" for n in range(10)] + list("_abemrstu")
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -3.0), ("▁item_", -2.0)]
    backend = Tokenizer(models.Unigram([*pieces, *((c, -4.0) for c in letters)], unk_id=2))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=[f"<extra_id_{n}>" for n in range(3)],
    ).save_pretrained(folder)


def test_a_backbone_is_finetuned_with_its_own_tokenizer(tiny_recipe: Path, tmp_path: Path) -> None:
    backbone = tmp_path / "backbone"
    t5 = T5ForConditionalGeneration(
        T5Config(d_model=16, d_kv=4, num_heads=2, d_ff=24, num_layers=1, vocab_size=40)
    )
    t5.save_pretrained(backbone)
    t5_tokenizer(backbone)
    sets = [*T5, f"model.backbone={backbone}", "pretrain.epochs=0", "finetune.batch_size=120"]
    setup, model = build_setup(load_recipe(tiny_recipe, sets))
    assert torch.equal(model.shared.weight, t5.shared.weight)
    tokenizer = setup.tokenizer
    assert (tokenizer.mask_token, tokenizer.bos_token) == ("<extra_id_0>", "<s>")
    assert model.config.decoder_start_token_id == tokenizer.convert_tokens_to_ids("<extra_id_0>")
    assert (model.config.eos_token_id, model.config.pad_token_id) == (1, 0)
    done = train(load_recipe(tiny_recipe, sets))
    loaded = load_run(done)
    encoder = encode_histories(
        np.array([3, 1, 4], np.int32), np.array([0, 3]), np.array([2]), loaded.layout
    )
    found = loaded.searcher.search(encoder, beam=64, top=64)
    assert sorted(found.items[0]) == list(range(64))
    # Mode `free` reads words that this tokenizer decodes without their leading space.
    word, texts = f" item_{loaded.catalogue.item_codes[7]}", loaded.searcher.texts
    ids = loaded.tokenizer.backend_tokenizer.encode(word, add_special_tokens=False).ids
    assert texts is not None
    assert texts.rows([ids, [*ids, *ids]]).tolist() == [7, -2]


def test_id_tables_may_be_outside(tiny_recipe: Path) -> None:
    """`best/` has them inside."""
    sets = [*T5, "optimizer.id_tables=row-adagrad", "model.id_dim=4", "pretrain.epochs=0"]
    done = train(load_recipe(tiny_recipe, sets))
    weights = load_file(done / "best" / "model.safetensors")
    assert weights["item_embedding.weight"].shape == (65, 4)
    assert not weights["item_embedding.weight"][0].any()
    assert load_run(done).model.config.ids_outside is False


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["packing=packed"], "packing packed: model.architecture t5 cannot have it: set padded"),
        (["model.encoder_attention=causal"], "model.encoder_attention causal: model.architecture t5"),
        (["finetune.targets=all-prefixes"], "finetune.targets all-prefixes: model.architecture t5 cannot have it: set every-prefix"),
        (["model.positions=from-end"], "model.positions from-end: model.architecture t5"),
        (["model.scale_embedding=true"], "model.scale_embedding true: model.architecture t5"),
        (["model.init_items=cooccurrence"], "model.init_items cooccurrence: model.architecture t5"),
        (["tokens.trim=true"], "tokens.trim true: model.architecture t5 cannot have it: set false"),
        (["compile=layers"], "compile layers: model.architecture t5 cannot have it: set none"),
        (["init_from=runs/x"], "init_from runs/x: model.architecture t5 cannot have it: set null"),
        (["prompt.template='Seen {history} Next'", "pretrain.epochs=0"], "model.architecture: a model with a prompt cannot have it"),
    ],
)  # fmt: skip
def test_what_a_t5_cannot_have_is_refused_by_name(
    tiny_recipe: Path, sets: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe(tiny_recipe, [*T5, *sets])


def test_no_run_starts_from_a_t5(
    run: Path, tiny_recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["train", str(tiny_recipe), "--from", str(run)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "a T5, from which no run can start" in line
    assert run_command(["plan", str(run / "recipe.yaml"), "--gpus", "1"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "model.architecture t5: memory and time of such a model are not foretold" in line
