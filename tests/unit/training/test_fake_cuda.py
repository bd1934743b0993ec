"""The whole path on a CUDA of fake tensors: no two devices meet, a training step waits for nothing,
and the number of launches is the committed one."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from fake_cuda import CUDA, Watch, fake_cuda
from genrec_kernels import embedding
from genrec_kernels.sharded_rows import RowTable

from genrec_dist.config.load import load_recipe
from genrec_dist.data.batch import RankStep
from genrec_dist.data.item_graph import Graph
from genrec_dist.data.packing import Attended, segments_of
from genrec_dist.decoding.searcher import TrieSearcher
from genrec_dist.decoding.trie import build_trie
from genrec_dist.distributed.collectives import Ranks
from genrec_dist.inference.history_scores import HistoryScores
from genrec_dist.inference.rank_users import Decoding, rank_batch
from genrec_dist.model.genrec import (
    GenRecConfig,
    GenRecForConditionalGeneration,
    choose_attention,
    choose_loss,
)
from genrec_dist.model.packed_attention import has_varlen
from genrec_dist.training.id_tables import IdTables
from genrec_dist.training.loader import StepBatches
from genrec_dist.training.setup import TrainingSetup, build_setup

LAUNCHES = json.loads(Path(__file__).with_name("launches.json").read_text(encoding="utf-8"))
"""Launches of a training step's forward pass, and of making a batch's lists, by case."""
BASE = {
    "d_model": 768,
    "encoder_layers": 6,
    "decoder_layers": 6,
    "encoder_attention_heads": 12,
    "decoder_attention_heads": 12,
    "encoder_ffn_dim": 3072,
    "decoder_ffn_dim": 3072,
}
OUTSIDE = ("optimizer.id_tables=row-adagrad", "model.id_dim=64")
ITEM_HEAD = ("model.item_loss=0.5", "precision=fp32")


@dataclass(frozen=True)
class World:
    """A recipe's setup, and its model's configuration."""

    setup: TrainingSetup
    config: GenRecConfig

    def step(self, packed: bool) -> RankStep:
        """The first step as a data worker makes it for a GPU."""
        made, config = self.setup, self.config
        outside = config if config.ids_outside else None
        data = StepBatches(
            made.stages, made.reader, made.layout, made.recipe, 0, 1, outside, config, packed
        )
        return data[0]

    def model(self) -> GenRecForConditionalGeneration:
        """On the fake device."""
        with torch.device("cuda"):
            model = GenRecForConditionalGeneration(self.config)
        model.tie_weights()
        choose_attention(model, self.setup.recipe.precision)
        choose_loss(model, self.setup.recipe.head)
        return model


@lru_cache
def world(data: Path, name: str, *changes: str) -> World:
    shape = BASE if name == "base" else {}
    changes = ("precision=bf16", "finetune.batch_size=32", *changes)
    recipe = load_recipe("tiny" if name == "base" else name, [f"data={data}", "run=r", *changes])
    setup, model = build_setup(recipe)
    return World(setup, GenRecConfig(**{**model.config.to_dict(), **shape}))


@pytest.fixture(autouse=True)
def _by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(embedding.SWITCH, raising=False)
    monkeypatch.setattr(embedding, "_TRITON", True)
    monkeypatch.setattr(embedding, "_launched", [""])


def autocast(found: World) -> torch.autocast:
    return torch.autocast("cuda", torch.bfloat16, enabled=found.setup.recipe.precision == "bf16")


def check_launches(case: str, watch: Watch) -> None:
    """Within 5 % of the committed number. After a change that is meant, write down the new one."""
    expected = LAUNCHES.get(case, 0)
    assert watch.num_launches == pytest.approx(expected, rel=0.05), (
        f"{case}: {watch.num_launches} launches, {expected} in launches.json: "
        f"{watch.launches.most_common(8)}"
    )


TRAINED = {
    "tiny": ("tiny",),
    "best": ("best",),
    "base": ("base",),
    "base fp32": ("base", "precision=fp32"),
    "outside": ("tiny", *OUTSIDE),
    "item head": ("best", *ITEM_HEAD),
    "item unit": ("tiny", "model.encoder_unit=item", "tokens.vocab_size=300"),
    "masks": ("small", "pretrain.epochs=1"),
}


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", TRAINED)
def test_a_training_step_waits_for_nothing_and_copies_once_a_micro_batch(
    name: str, packed: bool, tiny_data: Path
) -> None:
    found = world(tiny_data, *TRAINED[name])
    share = found.step(packed)
    with fake_cuda():
        model = found.model().train()
        tables = IdTables(found.config, 0, Ranks(), CUDA)
        with Watch() as watch, autocast(found):
            tables.attach(model, share)
            for batch in share.micro_batches:
                model(inputs=batch.to(CUDA))
    assert not watch.mixed
    assert not watch.waits
    # Attention by rectangles, where there is no kernel for ragged sequences, has indices besides.
    by_rectangles = packed and ("fp32" in "".join(TRAINED[name]) or share.micro_batches[0].packing.visible_m is not None)
    copies = Counter({"data/batch.py": len(share.micro_batches)})
    copies += Counter({"genrec_kernels/sharded_rows.py": len(tables.tables)})
    seen = Counter(line.partition(":")[0] for line in watch.copies.elements())
    rectangles = seen.pop("data/packing.py", 0)
    assert seen == copies
    assert rectangles <= 3 * len(share.micro_batches) * by_rectangles
    check_launches(f"{name} {'packed' if packed else 'padded'}", watch)


DECODED = {
    "tiny": (("tiny",), ("exact", "compact", "all", "hybrid")),
    "best": (("best",), ("exact", "compact", "all", "hybrid")),
    "base": (("base",), ("exact", "compact", "hybrid")),
    "item head": (("best", *ITEM_HEAD), ("items", "hybrid")),
    "outside": (("tiny", *OUTSIDE), ("exact",)),
}


@pytest.mark.parametrize("name", DECODED)
def test_lists_are_made_on_the_device_and_known_places_wait(name: str, tiny_data: Path) -> None:
    recipe, modes = DECODED[name]
    found = world(tiny_data, *recipe)
    made = found.setup
    view = made.dataset.sequences.history_and_target("test")
    users = view.users[:64]
    trie = build_trie(*made.words.tokens_of_items())
    scores = HistoryScores(Graph.of(made.dataset.sequences, "test", "n-2"))
    with fake_cuda():
        model = found.model().eval()
        tables = IdTables(found.config, 0, Ranks(), CUDA)
        with tables.serving(model, view, users):
            searcher = TrieSearcher(model, trie, CUDA)
            assert searcher.static
            for mode in modes:
                graph = scores if mode == "hybrid" else None
                with Watch() as watch, autocast(found):
                    lists = rank_batch(
                        searcher, made.layout, view, users, Decoding(mode=mode), graph
                    )
                assert lists.items.shape == (64, 20)
                assert not watch.mixed
                waits = {re.sub(":.*", "", line) for line in watch.waits}
                print(name, mode, watch.num_launches, dict(watch.waits))
