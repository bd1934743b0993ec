"""Decoding: our beam beside Hugging Face's `generate` and the plain loop, the trie's cost, and
evaluating beside an epoch."""

# B users, K beams, L input tokens, V vocabulary, N list, R decoder rows

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from genrec_shards.dataset import Dataset, load_dataset
from genrec_shards.histories import sample_users
from genrec_shards.splits import Split
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.modeling_outputs import BaseModelOutput

from genrec_dist.bench.beam_fixture import (
    EOS,
    MASK,
    PAD,
    VOCABULARY,
    PlainSearcher,
    Shape,
    World,
    make_users,
    spell,
    users_of,
)
from genrec_dist.bench.measure import Claim, in_turn, median, table
from genrec_dist.data.encoder_input import EncoderInput, encode_histories, ragged
from genrec_dist.data.word_table import WordTable
from genrec_dist.decoding import beam_search as trie_walk
from genrec_dist.decoding import searcher as beam_module
from genrec_dist.decoding.searcher import Mode, TopItems
from genrec_dist.decoding.trie import (
    Trie,
    build_trie,
    hash_of_words,
    load_trie,
    restrict,
    save_trie,
)
from genrec_dist.evaluation.metrics import TOP, metrics_from_histogram, rank_histogram, target_ranks
from genrec_dist.inference.load import LoadedRun

GENERATE = "generate + prefix_allowed_tokens_fn"
TENSOR_MASK = "generate + tensor mask"
PLAIN = "plain loop"
SAME = 1e-5
"""Scores nearer than this may change places between two ways of adding up the same float32
numbers."""
SHIFTED = 5e-4
"""What rounding may make of all scores of a list together."""


SMALL = Shape("d128 2+2", 128, 2, 4, 512, (1, 8, 32, 128), 32, 10, 80)
BART_BASE = Shape("BART-base 6+6", 768, 6, 12, 3072, (1, 4, 12), 12, 5, 6)
ON_GPU = (
    replace(SMALL, batches=(1, 32, 128, 512, 2048), exact_goal=30, compact_goal=None),
    replace(BART_BASE, batches=(1, 32, 128, 512), headline=32, exact_goal=30, compact_goal=None),
)
BEST_BATCH_GOAL = 5.0


def _shapes() -> tuple[Shape, ...]:
    return ON_GPU if torch.cuda.is_available() else (SMALL, BART_BASE)


@dataclass(frozen=True)
class Sizes:
    """What is measured; smaller ones are for tests."""

    shapes: tuple[Shape, ...] = field(default_factory=_shapes)
    items: int = 12_101
    users: int = 22_363
    """Of the synthetic histories that stand in where no data is given: those of Beauty."""
    beam: int = 20
    repeats: int = 5
    """Of each rival at the headline batches."""
    repeats_elsewhere: int = 1
    """At the other batches, of the two that go through `generate`; the others have `repeats`."""
    trie_items: int = 1_000_000
    watched_steps: int = 40
    """Of the training that evaluating is set beside."""
    repeats_of_evaluating: int = 3
    oracle_users: int = 200
    """For whom the whole catalogue is scored, to see what a beam misses."""


def bench_beam(
    data: Path | None = None, run: Path | None = None, sizes: Sizes | None = None
) -> tuple[list[Claim], dict[str, Any]]:
    """All of it. `data`: a directory of `genrec prepare` whose histories are decoded, or None for
    synthetic ones; with `run`, trained on it, also what evaluating takes beside an epoch.

    Raises AssertionError if two rivals that must agree give different lists.
    """
    if run is not None and data is None:
        raise ValueError("--run: give --data too, the directory the run was trained on")
    sizes = sizes or Sizes()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    users = (
        users_of(load_dataset(data).sequences, sizes.items)
        if data
        else make_users(sizes.users, sizes.items)
    )
    claims: list[Claim] = []
    shapes: dict[str, Any] = {}
    for shape in sizes.shapes:
        world = World(shape, users, sizes.items, device)
        found, shapes[shape.name] = measure_shape(world, sizes)
        claims += found
    found, trie = measure_trie(sizes.trie_items)
    claims += found
    evaluating: dict[str, Any] = {}
    if run is not None and data is not None:
        found, evaluating = evaluate_share(run, data, sizes)
        claims += found
    lengths = np.diff(users.offsets)
    described = {
        "source": data.name if data else "synthetic",
        "users": len(lengths),
        "items": sizes.items,
        "items a history": {"mean": float(lengths.mean()), "longest": int(lengths.max())},
    }
    more = {
        "sizes": _plain(sizes),
        "data": described,
        "shapes": shapes,
        "trie": trie,
        "evaluating": evaluating,
    }
    return claims, table("beam", claims, **more)


def _plain(sizes: Sizes) -> dict[str, Any]:
    return {**vars(sizes), "shapes": [vars(shape) for shape in sizes.shapes]}


# The peers.


def allowed_tokens(words: WordTable) -> dict[tuple[int, ...], list[int]]:
    """What may follow a prefix, as users of `prefix_allowed_tokens_fn` write it: a dict of
    tuples."""
    tokens, offsets = words.tokens_of_items()
    after: dict[tuple[int, ...], dict[int, None]] = {}
    for start, end in pairwise(offsets):
        whole = (*tokens[start:end].tolist(), EOS)
        for length, token in enumerate(whole):
            after.setdefault(whole[:length], {})[token] = None
    return {prefix: list(tokens) for prefix, tokens in after.items()}


class TensorMask(LogitsProcessor):
    """The same constraint from the trie's arrays, all beams at once: a peer that has only the mask
    in common with us."""

    def __init__(self, trie: Trie, device: torch.device):
        def move(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).to(device)

        self.span = int(trie.token.max()) + 1
        # Nodes lie in the order of (parent, token), so the pairs are sorted as they are.
        self.keys = move(trie.parent[1:] * self.span + trie.token[1:])
        self.token, self.end_item = move(trie.token.astype(np.int64)), move(trie.end_item)
        self.first_child, self.num_children = move(trie.first_child), move(trie.num_children)

    def __call__(self, input_ids_RT: Tensor, scores_RV: Tensor) -> Tensor:
        nodes_R = torch.zeros(len(input_ids_RT), dtype=torch.long, device=input_ids_RT.device)
        for tokens_R in input_ids_RT[:, 1:].T:
            wanted_R = nodes_R * self.span + tokens_R.clamp(max=self.span)
            places_R = torch.searchsorted(self.keys, wanted_R).clamp(max=len(self.keys) - 1)
            nodes_R = torch.where(
                (self.keys[places_R] == wanted_R) & (nodes_R >= 0), places_R + 1, -1
            )
        inside_R = nodes_R >= 0
        fans_R = self.num_children[nodes_R].where(inside_R, 0)
        rows_X = torch.repeat_interleave(fans_R)
        before_R = fans_R.cumsum(0) - fans_R
        columns_X = torch.arange(len(rows_X), device=rows_X.device) - before_R[rows_X]
        tokens_X = self.token[self.first_child[nodes_R[rows_X]] + columns_X]
        masked_RV = torch.full_like(scores_RV, -torch.inf)
        masked_RV[rows_X, tokens_X] = scores_RV[rows_X, tokens_X]
        ends_R = ~inside_R | (self.end_item[nodes_R] >= 0)
        masked_RV[ends_R, EOS] = scores_RV[ends_R, EOS]
        return masked_RV


Rival = Callable[[], Any]


def make_rivals(
    world: World, encoder: EncoderInput, beam: int, scored: bool = False
) -> dict[str, Rival]:
    """Each decodes this batch; those that `generate` give its output, with scores if they are asked
    for, the others TopItems."""
    after = allowed_tokens(world.words)
    mask = LogitsProcessorList([TensorMask(world.trie, world.device)])
    plain = PlainSearcher(world.model, world.trie, world.device)
    search = partial(world.searcher.search, encoder, beam=beam, top=beam)

    @torch.inference_mode()
    def generate(**constraint: Any) -> Any:
        return world.model.generate(
            encoder_outputs=BaseModelOutput(last_hidden_state=world.model.encode(encoder)),
            attention_mask=encoder.attention_mask.long(),
            decoder_start_token_id=MASK,
            num_beams=beam,
            num_return_sequences=beam,
            length_penalty=0.0,
            early_stopping="never",
            forced_bos_token_id=None,
            forced_eos_token_id=None,
            max_new_tokens=world.trie.depth + 2,
            do_sample=False,
            output_scores=scored,
            return_dict_in_generate=True,
            **constraint,
        )

    rivals: dict[str, Rival] = {
        "exact": search,
        "compact": partial(search, mode="compact"),
        PLAIN: partial(plain.search, encoder, beam=beam, top=beam),
        TENSOR_MASK: partial(generate, logits_processor=mask),
        GENERATE: partial(
            generate,
            prefix_allowed_tokens_fn=lambda _, ids: after.get(tuple(ids[1:].tolist()), [EOS]),
        ),
    }
    return {name: partial(_finished, run, world.device) for name, run in rivals.items()}


def _finished(run: Rival, device: torch.device) -> Any:
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result


def generated_lists(output: Any, words: WordTable, num_users: int) -> TopItems:
    """A user's list up to the first sequence that is no item: where fewer than all beams have
    ended, `generate` gives such."""
    tokens, offsets = words.tokens_of_items()
    row_of = {
        tuple(tokens[start:end].tolist()): row for row, (start, end) in enumerate(pairwise(offsets))
    }
    sequences, scores_BN = (
        output.sequences.tolist(),
        output.sequences_scores.view(num_users, -1).cpu().numpy(),
    )
    items_BN = np.full(scores_BN.shape, -1, np.int32)
    for place, sequence in enumerate(sequences):
        word = tuple(token for token in sequence[1:] if token not in (EOS, PAD))
        user, rank = divmod(place, scores_BN.shape[1])
        if EOS in sequence[1:] and scores_BN[user, rank] > -1e8:
            items_BN[user, rank] = row_of.get(word, -1)
    gone_BN = np.logical_or.accumulate(items_BN < 0, axis=1)
    return TopItems(
        np.where(gone_BN, -1, items_BN), np.where(gone_BN, -np.inf, scores_BN).astype(np.float32)
    )


def compare_lists(ours: TopItems, theirs: TopItems) -> dict[str, Any]:
    """Where two searches with the same rules differ. Raises AssertionError unless the items there
    tie to `SAME`.

    What all scores of a user's list differ by is taken off first: where one of 50,265 tokens has
    nearly all of the probability, torch's float32 `log_softmax`, which `generate` adds up, stands
    some 1e-5 above the true value, for all items alike."""
    differ_BN = ours.items != theirs.items
    both_BN = np.isfinite(ours.scores) & np.isfinite(theirs.scores)
    apart_BN = np.full(ours.scores.shape, np.nan)
    apart_BN[both_BN] = theirs.scores[both_BN].astype(np.float64) - ours.scores[both_BN]
    shift_B1 = np.array(
        [[np.median(row[~np.isnan(row)]) if (~np.isnan(row)).any() else 0.0] for row in apart_BN]
    )
    beside_BN = np.abs(apart_BN - shift_B1)
    wrong_BN = np.broadcast_to(np.abs(shift_B1) > SHIFTED, differ_BN.shape).copy()
    for user, rank in zip(*np.nonzero(differ_BN), strict=True):
        own = np.flatnonzero(ours.items[user] == theirs.items[user, rank])
        # Between two items of one list rounding has no say; an item that came in at the end has
        # only its own score.
        gap = (
            abs(ours.scores[user, own[0]] - ours.scores[user, rank])
            if len(own)
            else beside_BN[user, rank]
        )
        wrong_BN[user, rank] |= not gap < SAME
    if wrong_BN.any():
        user, rank = (int(values[0]) for values in np.nonzero(wrong_BN))
        raise AssertionError(
            f"user {user} of the batch, rank {rank}: item {ours.items[user, rank]} at {ours.scores[user, rank]:.7g}, "
            f"not {theirs.items[user, rank]} at {theirs.scores[user, rank]:.7g}"
        )
    return {
        "items compared": int((theirs.items >= 0).sum()),
        "items that differ": int(differ_BN.sum()),
        "largest common shift of a user's scores": float(np.abs(shift_B1).max()),
        "largest difference beside it": float(beside_BN[both_BN].max(initial=0.0)),
    }


# Measuring a shape.


def measure_shape(world: World, sizes: Sizes) -> tuple[list[Claim], dict[str, Any]]:
    """Batch curves of all rivals, their lists compared first, and the share of the trie at the
    headline batch."""
    shape = world.shape
    curve: dict[str, Any] = {}
    for size in shape.batches:
        curve[str(size)] = measure_batch(world, size, sizes)
    at_headline = curve[str(shape.headline)]
    share, trie = measure_trie_share(world, shape.headline, sizes)
    claims = _speed_claims(shape, curve)
    claims.append(
        Claim(
            f"trie, {shape.name}, batch {shape.headline}", "the whole search", median(trie["seconds of the trie"]),
            median(trie["seconds"]), "s a batch", share, "<= 0.01", share <= 0.01,
        )
    )  # fmt: skip
    work = flop_a_user(shape, np.asarray(at_headline["tokens a user"]), sizes.beam, world.trie)
    rate = product_rate(world.device)
    best = {
        name: max(point["users a second"][name] for point in curve.values())
        for name in ("exact", "compact")
    }
    bound = {name: rate / work[name] for name in best}
    more = {
        "parameters": sum(parameter.numel() for parameter in world.model.parameters()),
        "trie": {"nodes": world.trie.num_nodes, "tokens": len(np.unique(world.trie.token[1:]))},
        "batches": curve,
        "trie share": trie,
        "work": {
            "formula": FLOP_FORMULA,
            "FLOP a user": work,
            "FLOP a second of a float32 product here": rate,
            "users a second at that rate": bound,
            "best users a second": best,
            "share reached": {name: best[name] / bound[name] for name in best},
        },
    }
    return claims, more


def measure_batch(world: World, size: int, sizes: Sizes) -> dict[str, Any]:
    """Seconds of each rival at one batch; each runs once before, and those lists are compared."""
    encoder, _ = world.batch(size)
    rivals = make_rivals(world, encoder, sizes.beam)
    search = partial(world.searcher.search, encoder, beam=sizes.beam, top=sizes.beam)
    scored = make_rivals(world, encoder, sizes.beam, scored=True)
    theirs = {
        name: generated_lists(scored[name](), world.words, size) for name in (GENERATE, TENSOR_MASK)
    }
    # `generate` drops an end that ranks below `num_beams` among its step's candidates; ours does so
    # when asked.
    ranked, kept = search(ends="ranked"), search()
    compared = {name: compare_lists(ranked, lists) for name, lists in theirs.items()}
    compared[PLAIN] = compare_lists(kept, rivals[PLAIN]())
    gaps_BN = -np.diff(kept.scores, axis=1)
    rivals["compact"]()
    at_headline = size == world.shape.headline
    slow = {} if at_headline else {name: rivals.pop(name) for name in theirs}
    seconds = {
        **in_turn(rivals, sizes.repeats, warm_up=False),
        **in_turn(slow, sizes.repeats_elsewhere, warm_up=False),
    }
    return {
        "seconds": seconds,
        "users a second": {name: size / median(values) for name, values in seconds.items()},
        "tokens a user": encoder.attention_mask.sum(1).tolist(),
        "padded to": encoder.input_ids.shape[1],
        "lists compared with exact": compared,
        "items dropped where ends are ranked": int((ranked.items < 0).sum()),
        "items of two groups or more": float(
            (np.diff(world.words.tokens_of_items()[1])[kept.items] > 3).mean()
        ),
        "gap between neighbours of a list": {
            "median": float(np.median(gaps_BN)),
            "smallest": float(gaps_BN.min(initial=np.inf)),
        },
    }


def _speed_claims(shape: Shape, curve: dict[str, Any]) -> list[Claim]:
    at_headline = {
        name: median(values) for name, values in curve[str(shape.headline)]["seconds"].items()
    }
    where = f"{shape.name}, batch {shape.headline}"
    claims = []
    for mode, goal in (("exact", shape.exact_goal), ("compact", shape.compact_goal)):
        if goal is None:
            continue
        ours, theirs = at_headline[mode], at_headline[GENERATE]
        ratio = theirs / ours
        claims.append(
            Claim(
                f"{mode}, {where}",
                GENERATE,
                ours,
                theirs,
                "s a batch",
                ratio,
                f">= {goal:g}x",
                ratio >= goal,
            )
        )
    if torch.cuda.is_available():
        ours, theirs = (
            max(point["users a second"][name] for point in curve.values())
            for name in ("exact", GENERATE)
        )
        ratio, goal = ours / theirs, BEST_BATCH_GOAL
        name = f"exact, {shape.name}, each at its best batch"
        claims.append(
            Claim(name, GENERATE, ours, theirs, "users/s", ratio, f">= {goal:g}x", ratio >= goal)
        )
    return claims


FLOP_FORMULA = (
    "2 (L E (4 D^2 + 2 D F) + 2 E L^2 D + 2 L E D^2 + R (E (6 D^2 + 2 D F + 2 L D) + V D)): L input tokens of a user, E layers "
    "of the encoder and of the decoder each, D width, F feed-forward width, V tokens of the softmax, R decoder rows (the mask "
    "and the shared prefix once, then the beam a sub-word); no padding, no attention of the decoder to its own few tokens"
)


def flop_a_user(shape: Shape, tokens_B: np.ndarray, beam: int, trie: Trie) -> dict[str, float]:
    """Floating-point operations that decoding a user of this batch takes, by mode
    (FLOP_FORMULA)."""
    length, squared = float(tokens_B.mean()), float((tokens_B.astype(float) ** 2).mean())
    width, ffn, layers = shape.d_model, shape.ffn, shape.layers
    widths = np.minimum(np.diff(trie.level_offsets), beam)
    rows = float(widths.sum())  # a level's nodes are each taken in once: the root's is the mask
    encoder = length * layers * (4 * width**2 + 2 * width * ffn) + 2 * layers * squared * width
    cross = 2 * length * layers * width**2
    row = layers * (6 * width**2 + 2 * width * ffn + 2 * length * width)
    vocabulary = {"exact": VOCABULARY, "compact": len(np.unique(trie.token[1:])) + 1}
    return {
        mode: 2 * (encoder + cross + rows * (row + size * width))
        for mode, size in vocabulary.items()
    }


def product_rate(device: torch.device) -> float:
    """FLOP/s of a square float32 product, the best of five."""
    side = 8192 if device.type == "cuda" else 1536
    left, right = torch.randn(side, side, device=device), torch.randn(side, side, device=device)
    seconds = in_turn({"product": partial(_finished, partial(torch.mm, left, right), device)}, 5)[
        "product"
    ]
    return 2 * side**3 / min(seconds)


# The trie.


TRIE_FUNCTIONS = (
    (beam_module, "prune_items"),
    (beam_module, "exclude_by_level"),
    (trie_walk, "_ended"),
    (trie_walk, "_children"),
)
"""What a search does with its trie: pruning, ends of items, children and their masks, with the sums
of scores that go along."""


def measure_trie_share(world: World, size: int, sizes: Sizes) -> tuple[float, dict[str, Any]]:
    """(share, measurements) of the trie in a search that excludes the histories, by medians over
    repeats."""
    encoder, excluded = world.batch(size)
    search = partial(
        world.searcher.search, encoder, beam=sizes.beam, top=sizes.beam, excluded=excluded
    )
    search()
    inside, whole = [], []
    for _ in range(sizes.repeats):
        with _timed_trie(world.device) as clock:
            start = time.perf_counter()
            _finished(search, world.device)
            whole.append(time.perf_counter() - start)
        inside.append(sum(clock.values()))
    more = {"seconds of the trie": inside, "seconds": whole, "by function": clock}
    return median(inside) / median(whole), more


@contextlib.contextmanager
def _timed_trie(device: torch.device) -> Iterator[dict[str, float]]:
    """Seconds in each of the search's functions that read the trie; on a GPU each waits for the
    device before and after."""
    clock = {name: 0.0 for _, name in TRIE_FUNCTIONS}

    def timed(name: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        _finished(int, device)
        start = time.perf_counter()
        result = _finished(partial(function, *arguments, **options), device)
        clock[name] += time.perf_counter() - start
        return result

    with contextlib.ExitStack() as stack:
        for module, name in TRIE_FUNCTIONS:
            function = getattr(module, name)
            setattr(module, name, partial(timed, name, function))
            stack.callback(setattr, module, name, function)
        yield clock


def measure_trie(num_items: int) -> tuple[list[Claim], dict[str, Any]]:
    """Building, saving, loading and restricting a trie of random codes of up to 7 digits; medians
    of three."""
    dice = np.random.default_rng(0)
    most = max(10 * num_items, 2) - 1
    words = spell(dice.permutation(most)[:num_items] + 1, (0, 1), np.arange(2, 1102))
    keep = dice.permutation(num_items)[: max(num_items // 2, 1)]
    trie, words_hash = build_trie(*words), hash_of_words(*words)
    identity = {"numbering_hash": "0" * 64, "words_hash": words_hash}
    with tempfile.TemporaryDirectory(prefix="genrec-bench-") as name:
        path = Path(name) / "trie.safetensors"
        save = partial(save_trie, trie, path, **identity)
        save()
        # As a run is loaded: the words are hashed to see whether the trie is theirs.
        rivals: dict[str, Rival] = {
            "build": partial(build_trie, *words),
            "save": save,
            "hash words and load": lambda: (hash_of_words(*words), load_trie(path, **identity)),
            "restrict to half": partial(restrict, trie, keep),
        }
        seconds = {name: median(values) for name, values in in_turn(rivals, 3).items()}
        file_bytes = path.stat().st_size
    limit = 30.0
    ratio = seconds["build"] / limit
    claim = Claim(
        f"trie of {num_items:,} items",
        "30 s",
        seconds["build"],
        limit,
        "s to build",
        ratio,
        "<= 1x",
        ratio <= 1,
    )
    more = {
        "items": num_items,
        "sub-words": len(words[0]),
        "nodes": trie.num_nodes,
        "bytes": trie.num_bytes,
        "bytes a node and an item": [
            sum(a.itemsize for n, a in trie.arrays().items() if n not in _BY_ITEM),
            8,
        ],
        "file bytes": file_bytes,
        "seconds": seconds,
    }
    return [claim], more


_BY_ITEM = ("item_node", "level_offsets")


# Evaluating beside an epoch.


def evaluate_share(run: Path, data: Path, sizes: Sizes) -> tuple[list[Claim], dict[str, Any]]:
    """Decoding the whole test set beside an epoch of the same recipe's training, the two in turn.

    An epoch is the mean time of `sizes.watched_steps` steps, the first three left out, times the
    steps of an epoch. Raises ValueError if the run has logged no finished epoch."""
    from genrec_dist.inference.evaluate import evaluate
    from genrec_dist.inference.load import best_device, load_run
    from genrec_dist.inference.rank_users import Decoding

    steps_per_epoch = steps_of_an_epoch(run / "events.jsonl")
    loaded, dataset = load_run(run, best_device()), load_dataset(data)
    decoding = Decoding(exclude_history=loaded.model.config.exclude_history)
    epochs, decodings, wholes = [], [], []
    for _ in range(sizes.repeats_of_evaluating):
        with tempfile.TemporaryDirectory(prefix="genrec-bench-") as name:
            epochs.append(
                steps_per_epoch * seconds_a_step(run, data, Path(name) / "run", sizes.watched_steps)
            )
            start = time.perf_counter()
            metrics = evaluate(replace(loaded, path=Path(name)), dataset, "test", decoding=decoding)
            wholes.append(time.perf_counter() - start)
            assert metrics is not None
            decodings.append(float(metrics["seconds"]))
    decoding_seconds, epoch = median(decodings), median(epochs)
    share = decoding_seconds / epoch
    claim = Claim(
        f"evaluating {run.name}",
        "an epoch of its training",
        decoding_seconds,
        epoch,
        "s",
        share,
        "<= 0.1",
        share <= 0.1,
    )
    more = {
        "seconds of decoding": decodings,
        "seconds with baselines, intervals and files": wholes,
        "seconds an epoch": epochs,
        "users": dataset.sequences.num_users,
        "beam": decoding.beam,
        "batch": decoding.batch_size,
        "search error": search_error(loaded, dataset, num_users=sizes.oracle_users),
    }
    return [claim], more


def seconds_a_step(run: Path, data: Path, folder: Path, num_steps: int) -> float:
    """Mean seconds of an optimiser step of this run's recipe, watched from outside in a process of
    its own that is then ended."""
    settings = {
        "data": data,
        "run": folder,
        "log_every": 1,
        "pretrain.epochs": 0,
        "finetune.epochs": 1000,
    }
    overrides = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    command = [
        sys.executable,
        "-m",
        "genrec_dist.cli",
        "train",
        str(run / "recipe.yaml"),
        *overrides,
    ]
    started = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        # A process that never gets so far ends by itself, with its reason.
        while started.poll() is None and len(_steps_of(folder / "events.jsonl")) < num_steps:
            time.sleep(0.2)
        started.send_signal(signal.SIGTERM)
        _, errors = started.communicate(timeout=600)
    finally:
        started.kill()
    times = [step["time"] for step in _steps_of(folder / "events.jsonl")][3:]
    if len(times) < 2:
        raise ValueError(
            f"the run that was to be watched took too few steps: {errors.strip()[-500:]}"
        )
    return float(np.mean(np.diff(times)))


def steps_of_an_epoch(events: Path) -> int:
    """Optimiser steps of the first finetuning epoch that a run has validated. Raises ValueError if
    there is none."""
    first = None
    for event in _events(events):
        if event["event"] == "step" and event["stage"] == "finetune" and first is None:
            first = event["step"]
        if (
            event["event"] == "validation"
            and event["stage"] == "finetune"
            and first is not None
            and event["epoch"] == 0
        ):
            return int(event["step"]) + 1 - int(first)
    raise ValueError(
        f"{events}: no finished epoch of finetuning in it: train for one epoch at least"
    )


def _steps_of(events: Path) -> list[dict[str, Any]]:
    return [event for event in _events(events) if event["event"] == "step"]


def _events(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def format_curves(table: dict[str, Any]) -> str:
    """Users a second by shape and batch, as a plain table."""
    rows: list[tuple[str, ...]] = []
    for name, shape in table["shapes"].items():
        for size, point in shape["batches"].items():
            rates = point["users a second"]
            if not rows:
                rows.append(("users/s", "batch", *rates))
            rows.append((name, size, *(f"{rates[rival]:,.4g}" for rival in rows[0][2:])))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


BEAMS = (20, 50)

USERS_AT_ONCE = 50


def search_error(
    run: LoadedRun,
    dataset: Dataset,
    *,
    split: Split = "test",
    num_users: int = 1000,
    seed: int = 0,
    beams: tuple[int, ...] = BEAMS,
) -> dict[str, Any]:
    """`{"all": {...}, "beam 20": {...}, ...}` on a seeded sample of users, the history excluded.

    Each: metrics, seconds, and for beams `NDCG@10 lost` (all minus beam), `same top 10` (share of
    users whose first ten are those of `all`, in order) and `missed` (share of the oracle's first
    ten that the beam's twenty lack)."""
    view = dataset.sequences.history_and_target(split)
    users_U = view.users[sample_users(len(view.users), num_users, seed)]
    oracle, seconds = _lists(run, view, users_U, beam=TOP, mode="all")
    found: dict[str, Any] = {"all": {**_scores(oracle, view.targets[users_U]), "seconds": seconds}}
    for beam in beams:
        lists, seconds = _lists(run, view, users_U, beam=beam, mode="exact")
        scores = _scores(lists, view.targets[users_U])
        found[f"beam {beam}"] = {
            **scores,
            "NDCG@10 lost": found["all"]["NDCG@10"] - scores["NDCG@10"],
            "same top 10": float((lists[:, :10] == oracle[:, :10]).all(1).mean()),
            "missed": float(1 - (oracle[:, :10, None] == lists[:, None]).any(2).mean()),
            "seconds": seconds,
        }
    return {"users": len(users_U), "split": split, **found}


def _lists(
    run: LoadedRun, view: Any, users_U: np.ndarray, *, beam: int, mode: Mode
) -> tuple[np.ndarray, float]:
    lengths_U = (view.ends - view.starts)[users_U]
    items_UN = np.empty((len(users_U), TOP), np.int32)
    order = np.argsort(lengths_U, kind="stable")
    start = time.perf_counter()
    for first in range(0, len(order), USERS_AT_ONCE):
        places = order[first : first + USERS_AT_ONCE]
        flat, offsets = ragged(view.starts[users_U[places]], lengths_U[places])
        encoder = encode_histories(view.items[flat], offsets, users_U[places], run.layout).to(
            run.searcher.device
        )
        excluded = (np.repeat(np.arange(len(places)), lengths_U[places]), view.items[flat])
        items_UN[places] = run.searcher.search(
            encoder, beam=beam, top=TOP, mode=mode, excluded=excluded
        ).items
    return items_UN, time.perf_counter() - start


def _scores(items_UN: np.ndarray, targets_U: np.ndarray) -> dict[str, float]:
    metrics = metrics_from_histogram(rank_histogram(target_ranks(items_UN, targets_U)))
    return {name: metrics[name] for name in ("HR@10", "NDCG@10")}
