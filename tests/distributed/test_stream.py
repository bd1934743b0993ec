"""One global order: whatever the ranks, workers and tars, each step holds the same samples with the
same masks."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import forked
import pytest
from faulty_server import serving
from genrec_shards.dataset import load_dataset
from genrec_shards.prepare import prepare
from genrec_shards.sequences import write_sequences
from genrec_shards.storage.reader import ShardReader
from genrec_shards.storage.write import write_shards
from genrec_shards.synthetic import make_process
from hypothesis import given, settings
from hypothesis import strategies as st
from places import HELPERS
from stream_rank import Seen, items_by_tokens, read_back, walk
from two_ranks import environment, start_each

from genrec_dist.config.load import dump_recipe, load_recipe
from genrec_dist.training.loader import StepBatches
from genrec_dist.training.setup import TrainingSetup, build_setup

NUM_USERS = 56
WORLDS, WORKERS, TARS = (1, 2, 3, 4, 8), (0, 1, 2, 4), {1: 56, 3: 20, 7: 8}
RECIPE = """
workers: 1
micro_batch_tokens: 256
model: {d_model: 16, encoder_layers: 1, decoder_layers: 1, heads: 2, ffn: 16, max_tokens: 80}
tokens: {vocab_size: 300}
pretrain: {epochs: 1, batch_size: 17, mask: {strategy: multi, k: 2}}
finetune: {epochs: 2, batch_size: 40, targets: every-prefix}
"""


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> TrainingSetup:
    """The same records in 1, 3 and 7 tars; the epochs' last steps have fewer samples than eight
    ranks need."""
    folder = tmp_path_factory.mktemp("stream")
    write_sequences(
        make_process(num_items=64, num_groups=8).sample(NUM_USERS, 4, 9), folder / "log.txt"
    )
    dataset = prepare(folder / "log.txt", folder / "data")
    for number, users_per_shard in TARS.items():
        manifest = write_shards(
            dataset, folder / f"{number}-tars", users_per_shard=users_per_shard, users_per_record=4
        )
        assert len(manifest.shards) == number
    (folder / "recipe.yaml").write_text(f"data: {folder / 'data'}\nrun: {folder / 'run'}\n{RECIPE}")
    recipe = load_recipe(folder / "recipe.yaml", [f"shards={folder / '1-tars'}"])
    made, _ = build_setup(recipe)
    last_steps = [stage.plan.num_samples % stage.stage.batch_size for stage in made.stages]
    assert 0 < min(last_steps) < 8
    return made


def shards_of(setup: TrainingSetup, tars: int) -> Path:
    return Path(setup.recipe.run).parent / f"{tars}-tars"


def seen_by(
    setup: TrainingSetup, reader: ShardReader, rank: int, world: int, steps: range, workers: int
) -> list[Seen]:
    data = StepBatches(setup.stages, reader, setup.layout, setup.recipe, rank, world)
    return walk(data, steps, workers, setup.words)


def all_steps(setup: TrainingSetup) -> range:
    return range(setup.stages[-1].end_step)


@pytest.fixture(scope="module")
def reference(setup: TrainingSetup) -> list[Seen]:
    """One rank without workers."""
    return seen_by(setup, setup.reader, 0, 1, all_steps(setup), 0)


def check_step(parts: list[Seen], expected: Seen) -> None:
    """What the ranks saw of a step, together, is what one rank sees of it; each took as many rows
    as the others."""
    assert Counter(sample for part in parts for sample in part.samples) == Counter(expected.samples)
    assert sum(part.digest for part in parts) % 2**64 == expected.digest % 2**64
    assert len({part.num_samples + part.num_padding for part in parts}) == 1
    assert sum(part.num_samples for part in parts) == len(expected.samples)
    assert sum(part.num_padding for part in parts) == -len(expected.samples) % len(parts)
    for part in parts:  # padding is counted, and has no label
        assert (part.num_padding_rows, len(part.samples)) == (part.num_padding, part.num_samples)


def test_an_epoch_is_the_dataset(setup: TrainingSetup, reference: list[Seen]) -> None:
    sequences = load_dataset(setup.recipe.data).sequences
    parts = [
        sequences.items[sequences.offsets[user] : sequences.offsets[user + 1] - 2]
        for user in range(NUM_USERS)
    ]
    pretrain, finetune = setup.stages
    masked = [sample for step in reference[: pretrain.end_step] for sample in step.samples]
    # Each user once, and what is seen and what is asked for make up the training part.
    whole = []
    for user, history, targets in masked:
        items = [*history, *(item for _, some in targets for item in some)]
        whole.append((user, *sorted(items)))
    assert sorted(whole) == [(user, *sorted(part.tolist())) for user, part in enumerate(parts)]
    expected = Counter(
        (user, tuple(part[:place].tolist()), ((0, (int(part[place]),)),))
        for user, part in enumerate(parts)
        for place in range(1, len(part))
    )
    assert set(expected.values()) == {1}
    length = finetune.plan.steps_per_epoch
    starts = range(finetune.first_step, finetune.end_step, length)
    epochs = [reference[start : start + length] for start in starts]
    assert len(epochs) == 2
    for epoch in epochs:
        assert Counter(sample for step in epoch for sample in step.samples) == expected
    assert [step.samples for step in epochs[0]] != [step.samples for step in epochs[1]]
    assert len({step.digest for step in reference}) == len(reference)


@pytest.mark.filterwarnings(
    "ignore:This DataLoader will create"
)  # more workers than cores are wanted here
@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("tars", TARS)
def test_any_topology_takes_the_same_steps(
    setup: TrainingSetup, reference: list[Seen], tars: int, workers: int
) -> None:
    reader = ShardReader(shards_of(setup, tars))
    for world in WORLDS if workers == 0 else (1, 3):  # workers know nothing of other ranks
        ranks = [
            seen_by(setup, reader, rank, world, all_steps(setup), workers) for rank in range(world)
        ]
        assert {len(steps) for steps in ranks} == {len(reference)}
        for parts, expected in zip(zip(*ranks, strict=True), reference, strict=True):
            check_step(list(parts), expected)


worlds = st.integers(1, 9)


@given(before=worlds, after=worlds, tars=st.sampled_from(list(TARS)), data=st.data())
@settings(max_examples=60, deadline=None)
def test_run_killed_at_any_step_goes_on_with_any_world(
    setup, reference, before: int, after: int, tars: int, data: st.DataObject
) -> None:
    """Nothing of what the ranks before had seen, or had loaded ahead, is needed or repeated."""
    end = len(reference)
    killed_at = data.draw(st.integers(0, end - 1))
    item_of = items_by_tokens(setup.words)
    taken = []
    for world, steps in (
        (before, range(max(killed_at - 1, 0), killed_at)),
        (after, range(killed_at, end)),
    ):
        reader = ShardReader(shards_of(setup, tars), verify=False)
        ranks = [
            StepBatches(setup.stages, reader, setup.layout, setup.recipe, r, world)
            for r in range(world)
        ]
        for step in steps:
            parts = [read_back(rank[step], setup.words, item_of) for rank in ranks]
            check_step(parts, reference[step])
            taken.append(step)
    assert taken[-(end - killed_at) :] == list(range(killed_at, end))


@pytest.mark.dist
@pytest.mark.parametrize("world", [2, 3])
def test_real_ranks_take_the_same_steps(
    setup: TrainingSetup, reference: list[Seen], tmp_path: Path, world: int
) -> None:
    """Three ranks share one tar behind an address; the node fetches each record once."""
    with serving(shards_of(setup, 1).parent) as server:
        shards = f"{server.url}/1-tars" if world == 3 else str(shards_of(setup, 7))
        recipe = replace(setup.recipe, shards=shards)
        (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
        script = HELPERS / "stream_rank.py"
        env = environment(GENREC_CACHE=str(tmp_path / "cache"))
        command = [script, tmp_path / "recipe.yaml", tmp_path]
        done = start_each(command, tmp_path / "logs", world, timeout=300, env=env)
        assert not any(rank.returncode for rank in done), done
        records = [request for request in server.requests if request[1]]
        expected = setup.reader.num_records if world == 3 else 0
        assert len(records) == len(set(records)) == expected
    reports = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(world)]
    digests = [step.digest % 2**64 for step in reference]
    assert all(report["digests"] == digests for report in reports)
    for number, expected in enumerate(reference):
        check_step([seen_from(report["steps"][number]) for report in reports], expected)


def seen_from(fields: dict) -> Seen:
    samples = [
        (user, tuple(history), tuple((mask, tuple(items)) for mask, items in targets))
        for user, history, targets in fields["samples"]
    ]
    return Seen(**{**fields, "samples": samples})


@pytest.mark.parametrize("workers", [0, 1])
def test_server_that_fails_in_the_middle_ends_the_run_in_one_line(
    setup: TrainingSetup, tmp_path: Path, workers: int
) -> None:
    """Also where a worker reads: it must neither keep the run from ending nor show its
    traceback."""
    with serving(shards_of(setup, 7).parent) as server:
        server.fault = lambda path, number: "404" if path.endswith("shard-000003.tar") else None
        shards, run = f"{server.url}/7-tars", tmp_path / "run"
        recipe = replace(setup.recipe, shards=shards, run=str(run), workers=workers)
        (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
        command = ["-m", "genrec_dist.cli", "train", tmp_path / "recipe.yaml"]
        done = forked.run(command, environment(GENREC_CACHE=str(tmp_path / "cache")), timeout=120)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("genrec:")]
    assert line.startswith(f"genrec: {shards}/shard-000003.tar: record ")
    assert "no such file on the server" in line
    assert "Traceback" not in done.stderr
    assert json.loads((run / "status.json").read_text())["status"] == "failed"
