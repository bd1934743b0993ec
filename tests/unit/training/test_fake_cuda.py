"""The whole path on a CUDA of fake tensors: no two devices meet, a training step waits for nothing,
and the number of launches is the committed one."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from fake_cuda import CUDA, FUSED, Watch, fake_cuda
from genrec_kernels import embedding
from torch._subclasses.fake_tensor import FakeTensorMode

from genrec_dist.config.load import load_recipe
from genrec_dist.data.batch import RankStep
from genrec_dist.data.item_graph import Graph
from genrec_dist.data.word_table import ItemTexts
from genrec_dist.decoding.searcher import TrieSearcher
from genrec_dist.decoding.trie import build_trie
from genrec_dist.distributed.collectives import Ranks
from genrec_dist.estimate.launches import Rectangles, launches
from genrec_dist.inference.history_scores import HistoryScores
from genrec_dist.inference.rank_users import Decoding, rank_batch
from genrec_dist.model import packed_attention
from genrec_dist.model.genrec import GenRecConfig, GenRecForConditionalGeneration
from genrec_dist.model.low_weights import LowWeights
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
WAITS = {
    "data/encoder_input.py: return self.map(lambda values: values.to(device, non_blocking=True))",
    "decoding/levels.py: return torch.from_numpy(filled).to(device, non_blocking=True)",
    "decoding/searcher.py: return TopItems(items_BN.cpu().numpy().astype(np.int32), "
    "scores_BN.float().cpu().numpy())",
}
"""Of the static search: its inputs come, from memory that is not pinned, and its lists go."""
WAITS_OF_OTHER_MODES = {
    "decoding/searcher.py: lengths = lengths_B[order].tolist()",
    "decoding/searcher.py: users, items = (column.to(self.device) for column in columns)",
    "decoding/searcher.py: known = known.map(lambda prob_BN: prob_BN.to(self.device, scores_BN.dtype))",
    "decoding/searcher.py: return torch.from_numpy(paths_NT).to(self.device)",
    "decoding/decoder_state.py: real_n = None if static else mask_BL.flatten().nonzero()[:, 0]",
    "decoding/beam_search.py: pair, beam = match_XK.nonzero(as_tuple=True)",
    "decoding/beam_search.py: if tied.any():",
    "decoding/beam_search.py: least, num_open = torch.stack((num_B.min(), num_B.max())).tolist()",
    "decoding/exhaustive.py: found_BN[users, trie.end_item[nodes][ending]] = "
    "reached_BMV[:, ending, 0]",
    "decoding/unconstrained.py: return found_BN.float().cpu().numpy(), "
    "strings_BNT.cpu().numpy(), lengths_BN.cpu().numpy()",
    "decoding/exhaustive.py: parent_M = "
    "torch.from_numpy(parents[start : start + NODES_AT_ONCE]).to(device)",
}
"""Of the searches whose shapes follow the users."""
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

    @property
    def is_bf16(self) -> bool:
        return self.setup.recipe.precision == "bf16"

    def model(self, device: str = "cuda") -> GenRecForConditionalGeneration:
        """On a fake device, with a GPU's choices."""
        with torch.device(device):
            model = GenRecForConditionalGeneration(self.config)
        model.tie_weights()
        model.set_attn_implementation("sdpa")
        model.loss_by = "full"
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


def autocast(found: World, device: str = "cuda") -> torch.autocast:
    return torch.autocast(device, torch.bfloat16, enabled=found.is_bf16)


def check_launches(case: str, watch: Watch) -> None:
    """Within 5 % of the committed number. After a change that is meant, write down the new one."""
    expected = LAUNCHES[case]
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
        low = LowWeights(model, torch.bfloat16) if found.is_bf16 else None
        with Watch() as watch, autocast(found):
            tables.attach(model, share)
            for batch in share.micro_batches:
                with low.in_place() if low else nullcontext():
                    model(inputs=batch.to(CUDA))
    assert not watch.mixed
    assert not watch.waits
    copies = Counter(line.partition(":")[0] for line in watch.copies.elements())
    # Where there is no kernel for ragged sequences, the rectangles' indices come besides.
    rectangles = copies.pop("data/packing.py", 0)
    by_rectangles = packed and (not found.is_bf16 or found.config.encoder_attention == "causal")
    assert rectangles <= 3 * len(share.micro_batches) * by_rectangles
    expected = {"data/batch.py": len(share.micro_batches)}
    if tables.tables:  # once a step
        expected["genrec_kernels/sharded_rows.py"] = len(tables.tables)
    assert copies == expected
    check_launches(f"{name} {'packed' if packed else 'padded'}", watch)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", ["tiny", "best", "base"])
def test_the_backward_pass_waits_for_nothing(
    name: str, packed: bool, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU of fake tensors with a GPU's choices: without a GPU autograd has no streams."""
    monkeypatch.setenv(embedding.SWITCH, "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(embedding, "_rows", lambda ids, tables: [])  # ids on a CPU are checked
    monkeypatch.setattr(packed_attention, "has_varlen", lambda query: True)
    for place, attention in FUSED:
        monkeypatch.setattr(place, attention)
    found = world(tiny_data, *TRAINED[name])
    batch = found.step(packed=packed).micro_batches[0]
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = found.model("cpu").train()
        low = LowWeights(model, torch.bfloat16)
        with Watch("cpu"), autocast(found, "cpu"), low.in_place():
            loss = model(inputs=batch)
        with Watch("cpu") as watch:
            loss.backward()
    assert not watch.waits
    check_launches(f"{name} backward{' packed' * packed}", watch)


@pytest.mark.parametrize(
    ("name", "packed"),
    [
        *((name, packed) for name in ("tiny", "best", "base") for packed in (False, True)),
        ("base fp32", False),
        ("base fp32", True),
        ("item unit", False),
    ],
)
def test_launches_are_foretold_by_a_formula(name: str, packed: bool, tiny_data: Path) -> None:
    """Of the committed numbers, which the tests above count."""
    found = world(tiny_data, *TRAINED[name])
    rectangles = None
    if packed:
        packing = found.step(packed=True).micro_batches[0].packing
        assert packing is not None
        rectangles = Rectangles(
            encoder=0 if found.is_bf16 else len(packing.within_encoder.groups),
            decoder=0 if found.is_bf16 else len(packing.within_decoder.groups),
            cross=len(packing.across.groups) if "fp32" in name or name == "best" else 0,
        )
    causal = found.config.encoder_attention == "causal"
    forward, backward = launches(found.config, found.is_bf16, rectangles, causal)
    counted = LAUNCHES[f"{name} {'packed' if packed else 'padded'}"]
    assert forward == pytest.approx(counted, rel=0.12)
    counted = LAUNCHES.get(f"{name} backward{' packed' * packed}")
    assert counted is None or backward == pytest.approx(counted, rel=0.12)


def test_heads_that_flash_attention_does_not_take_go_by_rectangles() -> None:
    with fake_cuda():
        taken = [
            width
            for width in (4, 8, 10, 64, 100, 128, 256, 264)
            if has_varlen(torch.empty(3, 2, width, dtype=torch.bfloat16, device=CUDA))
        ]
        assert not has_varlen(torch.empty(3, 2, 64, device=CUDA))
    assert taken == [8, 64, 128, 256]


DECODED = {
    "tiny": (("tiny",), ("exact", "compact", "all", "hybrid", "free")),
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
        with Watch() as making, tables.serving(model, view, users):
            codes = made.dataset.numbering.item_codes
            texts = ItemTexts(made.tokenizer, codes, made.words.vocabulary)
            searcher = TrieSearcher(model, trie, CUDA, texts=texts)
        assert searcher.static
        # Once for each searcher: rows, the trie's arrays, and the tokens of `compact`.
        files = {line.partition(":")[0] for line in making.waits}
        assert files <= {
            "decoding/searcher.py",
            "decoding/output_head.py",
            "decoding/levels.py",
            "training/id_tables.py",
        }
        for mode in modes:
            graph = scores if mode == "hybrid" else None
            with Watch() as watch, autocast(found):
                lists = rank_batch(searcher, made.layout, view, users, Decoding(mode=mode), graph)
            assert lists.items.shape == (64, 20)
            assert not making.mixed | watch.mixed
            known = WAITS if mode in ("exact", "compact") else WAITS | WAITS_OF_OTHER_MODES
            assert watch.waits.keys() <= known
            check_launches(f"{name} {mode}", watch)
