"""Streaming: decode speed and bytes beside one JSON a sample, resuming late in an epoch, waiting
for data, bytes over a network."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from genrec_shards.dataset import Dataset, load_dataset
from genrec_shards.prepare import prepare
from genrec_shards.sequences import Sequences, sequences_from_ids, write_sequences
from genrec_shards.storage.reader import ShardReader
from genrec_shards.storage.sample_order import Plan, split_among_ranks
from genrec_shards.storage.write import write_shards

from genrec_dist.bench.measure import Claim, in_turn, median, table
from genrec_dist.config.load import load_recipe
from genrec_dist.config.recipe import Recipe
from genrec_dist.inference.load import make_layout
from genrec_dist.training.loader import StepBatches
from genrec_dist.training.setup import build_setup
from genrec_dist.training.stages import plan_stages

# U users, n samples

BATCH = 512
PEER = "webdataset 1.0.2, one JSON a sample"


@dataclass(frozen=True)
class Sizes:
    """What is measured; smaller ones are for tests."""

    users: int = 22_363
    """Of the synthetic data that stands in where none is given: those of Beauty."""
    items: int = 12_101
    many_users: int = 200_000
    """Of the epoch that is resumed, and of the one that comes over a network."""
    users_per_record: int = 128
    """Over the network; small, so that there are many more records than a process keeps decoded."""
    train_steps: int = 25
    """Steps of the training run that is watched; 0 leaves it out."""
    repeats: int = 5


def bench_stream(
    data: Path | None = None, sizes: Sizes | None = None
) -> tuple[list[Claim], dict[str, Any]]:
    """All of it; `data`: a directory of `genrec prepare`, or None for synthetic data of Beauty's
    size."""
    sizes = sizes or Sizes()
    with tempfile.TemporaryDirectory(prefix="genrec-bench-") as name:
        folder = Path(name)
        dataset = (
            load_dataset(data) if data else make_data(folder / "small", sizes.users, sizes.items)
        )
        write_shards(dataset, folder / "shards")
        many = make_data(folder / "many", sizes.many_users, sizes.items)
        write_shards(many, folder / "many" / "data" / "shards")
        decoded, decoding = measure_decoding(dataset.sequences, folder, sizes)
        resumed, resuming = measure_resuming(many, sizes)
        over, network = measure_network(many, folder, sizes)
        waited, waiting = measure_waiting(dataset, folder, sizes) if sizes.train_steps else ([], {})
    described = {
        "source": data.name if data else "synthetic",
        "users": dataset.sequences.num_users,
        "interactions": dataset.sequences.num_interactions,
    }
    more = {"sizes": vars(sizes), "data": described, "decoding": decoding, "resuming": resuming}
    claims = [*decoded, *resumed, *waited, *over]
    return claims, table("stream", claims, **more, waiting=waiting, network=network)


def make_data(folder: Path, num_users: int, num_items: int, seed: int = 0) -> Dataset:
    """Prepared sequences of 5 items and more, 9 in the mean; the popularity of rank r falls as 1 /
    r."""
    dice = np.random.default_rng(seed)
    lengths = 4 + dice.geometric(1 / 5, num_users)
    items = np.exp(dice.random(lengths.sum()) * np.log(num_items)).astype(np.int64)
    log = sequences_from_ids(
        [f"u{user}" for user in range(num_users)], lengths, [str(item) for item in items]
    )
    folder.mkdir()
    write_sequences(log, folder / "log.txt")
    return prepare(folder / "log.txt", folder / "data")


# Decoding and bytes.


def write_json_tars(sequences: Sequences, folder: Path, users_per_tar: int = 8192) -> list[str]:
    """The peer's layout: a sample a user, `{"user": row, "items": [row, ...]}`."""
    import webdataset as wds

    folder.mkdir()
    paths: list[str] = []
    for first in range(0, sequences.num_users, users_per_tar):
        paths.append(str(folder / f"{len(paths):06d}.tar"))
        with contextlib.closing(wds.TarWriter(paths[-1])) as writer:
            for user in range(first, min(first + users_per_tar, sequences.num_users)):
                items = sequences.items[
                    sequences.offsets[user] : sequences.offsets[user + 1]
                ].tolist()
                writer.write({"__key__": f"{user:09d}", "json": {"user": user, "items": items}})
    return paths


def read_json_tars(paths: list[str]) -> Iterator[dict[str, Any]]:
    """As its documentation reads one JSON a sample, without the decoders that would run a
    pickle."""
    import webdataset as wds

    for sample in wds.WebDataset(paths, shardshuffle=False):
        yield json.loads(sample["json"])


def read_shards(path: Path, verify: bool) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(user rows, items, offsets) of each step of an epoch in the order of training, from a reader
    that knows nothing yet."""
    reader = ShardReader(path, verify=verify)
    plan = Plan(
        reader.lengths, reader.manifest.users_per_record, space="user", batch_size=BATCH, seed=0
    )
    for step in range(plan.steps_per_epoch):
        users = plan.step(0, step).user_rows
        yield users, *reader.gather(users)


def measure_decoding(
    sequences: Sequences, folder: Path, sizes: Sizes
) -> tuple[list[Claim], dict[str, Any]]:
    ours, theirs = folder / "shards", write_json_tars(sequences, folder / "json")
    check_same(sequences, ours, theirs)
    seconds = in_turn(
        {
            "ours": lambda: _drain(read_shards(ours, verify=False)),
            "ours, verified": lambda: _drain(read_shards(ours, verify=True)),
            "theirs": lambda: _drain(read_json_tars(theirs)),
        },
        sizes.repeats,
    )
    rates = {name: sequences.num_users / median(values) for name, values in seconds.items()}
    raw = 4 * (sequences.num_interactions + 2 * sequences.num_users)
    tars = sum(path.stat().st_size for path in ours.glob("*.tar"))
    whole = sum(path.stat().st_size for path in ours.iterdir())
    json_tars = sum(Path(path).stat().st_size for path in theirs)
    speed, size = rates["ours"] / rates["theirs"], tars / raw
    claims = [
        Claim(
            "decode",
            PEER,
            rates["ours"],
            rates["theirs"],
            "samples/s",
            speed,
            ">= 30x",
            speed >= 30,
        ),
        Claim(
            "bytes", "items + offset + user, 4 B each", tars, raw, "B", size, "<= 1.2x", size <= 1.2
        ),
    ]
    more = {
        "seconds": seconds,
        "samples_per_second": rates,
        "bytes": {
            "tars": tars,
            "with manifest and lengths": whole,
            "raw": raw,
            "json tars": json_tars,
        },
    }
    return claims, more


def check_same(sequences: Sequences, ours: Path, theirs: list[str]) -> None:
    """Both layouts give every user's sequence. Raises AssertionError for a measurement of two
    different things."""
    num_users = 0
    for sample in read_json_tars(theirs):
        user = sample["user"]
        assert (
            sample["items"]
            == sequences.items[sequences.offsets[user] : sequences.offsets[user + 1]].tolist()
        )
        num_users += 1
    assert num_users == sequences.num_users
    # The plan leaves out users without a sample, and then the two would not decode the same.
    seen = np.zeros(sequences.num_users, dtype=int)
    for users, items, offsets in read_shards(ours, verify=True):
        seen[users] += 1
        for place, user in enumerate(users):
            own = sequences.items[sequences.offsets[user] : sequences.offsets[user + 1]]
            assert np.array_equal(items[offsets[place] : offsets[place + 1]], own)
    assert (seen == 1).all()


def _drain(values: Iterator[Any]) -> None:
    for _ in values:
        pass


# Resuming.


def measure_resuming(dataset: Dataset, sizes: Sizes) -> tuple[list[Claim], dict[str, Any]]:
    """Seconds from a fresh reader and plan to the first batch, at the beginning and at 90 % of an
    epoch."""
    recipe = _recipe(dataset, dataset.path / "shards")
    setup, model = build_setup(recipe)
    layout = make_layout(setup.words, model.config)
    num_steps = setup.stages[-1].plan.steps_per_epoch

    def first_batch(step: int) -> None:
        reader = ShardReader(recipe.shards_dir, verify=False)
        StepBatches(plan_stages(recipe, reader), reader, layout, recipe, 0, 1)[step]

    places = {f"{share} %": num_steps * share // 100 for share in (0, 10, 50, 90)}
    seconds = in_turn(
        {name: partial(first_batch, step) for name, step in places.items()}, sizes.repeats
    )
    late, early = median(seconds["90 %"]), median(seconds["0 %"])
    ratio = late / early
    claim = Claim(
        "resume",
        "the beginning of the epoch",
        late,
        early,
        "s to the first batch",
        ratio,
        "<= 2x",
        ratio <= 2,
    )
    more = {
        "seconds": seconds,
        "steps": places,
        "steps_per_epoch": num_steps,
        "users": dataset.sequences.num_users,
    }
    return [claim], more


def _recipe(dataset: Dataset, shards: Path, *more: str) -> Recipe:
    """`tiny` over every prefix of this data."""
    return load_recipe("tiny", [f"data={dataset.path}", f"shards={shards}", *more])


# Waiting.


def measure_waiting(
    dataset: Dataset, folder: Path, sizes: Sizes
) -> tuple[list[Claim], dict[str, Any]]:
    """The share of a training step in which `genrec train tiny` waits for its batch, the first two
    steps left out."""
    run = folder / "run"
    settings = {"data": dataset.path, "shards": folder / "shards", "run": run, "log_every": 1}
    overrides = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "genrec_dist.cli", "train", "tiny", *overrides]
    started = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        # A process that never gets so far ends by itself, with its reason.
        while started.poll() is None and len(_steps(run)) < sizes.train_steps:
            time.sleep(0.2)
        started.send_signal(signal.SIGTERM)
        _, errors = started.communicate(timeout=600)
    finally:
        started.kill()
    steps = _steps(run)[2:]
    if not steps:
        raise ValueError(f"the run that was to be watched took no step: {errors.strip()[-500:]}")
    shares = [step["data_wait_share"] for step in steps]
    times = [step["time"] for step in steps]
    share = float(np.mean(shares))
    claim = Claim(
        "wait", "a step of tiny", share, 1.0, "of a step", share, "<= 0.01", share <= 0.01
    )
    more = {
        "shares": shares,
        "seconds_a_step": float(np.mean(np.diff(times))) if len(times) > 1 else None,
        "seconds_to_make_a_batch": _seconds_a_batch(dataset, folder / "shards"),
        "workers": load_recipe("tiny").workers,
    }
    return [claim], more


def _steps(run: Path) -> list[dict[str, Any]]:
    path = run / "events.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    events = [json.loads(line) for line in lines if line.endswith("\n")]
    return [event for event in events if event["event"] == "step"]


def _seconds_a_batch(dataset: Dataset, shards: Path, num_steps: int = 20) -> float:
    setup, _ = build_setup(_recipe(dataset, shards))
    data = StepBatches(setup.stages, setup.reader, setup.layout, setup.recipe, 0, 1)
    end = min(num_steps, setup.stages[-1].end_step)
    start = time.perf_counter()
    for step in range(end):
        data[step]
    return (time.perf_counter() - start) / end


# Bytes over a network.


def measure_network(
    dataset: Dataset, folder: Path, sizes: Sizes
) -> tuple[list[Claim], dict[str, Any]]:
    """Bytes that a node fetches in each of two epochs over those of the directory: ranks in step,
    one shared cache on disk."""
    shards = folder / "remote"
    per_record = sizes.users_per_record
    manifest = write_shards(
        dataset, shards, users_per_record=per_record, users_per_shard=64 * per_record
    )
    size = sum(path.stat().st_size for path in shards.iterdir())
    caches = {"larger than the data": 4 * size, "a quarter of the data": size // 4, "none": 0}
    found: dict[str, Any] = {}
    with _serving(shards) as (address, sent):
        for num_ranks in (1, 2):
            for name, cache_bytes in caches.items():
                cache = folder / f"cache-{num_ranks}-{cache_bytes}"
                start = time.perf_counter()
                epochs = _epochs_over_network(address, sent, cache, cache_bytes, num_ranks)
                found[f"{num_ranks} ranks, cache {name}"] = {
                    "amplification": [epoch / size for epoch in epochs],
                    "seconds": time.perf_counter() - start,
                }
    claims = []
    for num_ranks in (1, 2):
        first, second = found[f"{num_ranks} ranks, cache larger than the data"]["amplification"]
        fetched = first + second
        goal = "<= 1.1x in two epochs"
        name = f"network, {num_ranks} ranks a node"
        claims.append(
            Claim(
                name,
                "the shard directory, once",
                fetched * size,
                size,
                "B",
                fetched,
                goal,
                fetched <= 1.1,
            )
        )
    more = {
        "bytes": size,
        "records": manifest.num_records,
        "decoded_records_a_process": 256,
        "cases": found,
    }
    return claims, more


def _epochs_over_network(
    address: str, sent: list[int], cache: Path, cache_bytes: int, num_ranks: int
) -> list[int]:
    """Bytes the server sent in each of two epochs, manifests and lengths included."""
    epochs, before = [], sum(sent)
    readers = [
        ShardReader(address, cache_dir=cache, cache_bytes=cache_bytes) for _ in range(num_ranks)
    ]
    lengths, users_per_record = readers[0].lengths, readers[0].manifest.users_per_record
    plan = Plan(lengths, users_per_record, space="user", batch_size=BATCH, seed=0)
    for epoch in range(2):
        for step in range(plan.steps_per_epoch):
            samples = plan.step(epoch, step)
            for rank, reader in enumerate(readers):
                reader.gather(split_among_ranks(samples, rank, num_ranks).user_rows)
        epochs.append(sum(sent) - before)
        before = sum(sent)
    return epochs


@contextlib.contextmanager
def _serving(folder: Path) -> Iterator[tuple[str, list[int]]]:
    """(address, bytes of each answer so far) of a server of this directory on loopback that honours
    Range."""
    sent: list[int] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # or a body waits 40 ms behind its head

        def do_GET(self) -> None:
            path, asked = folder / Path(self.path).name, self.headers.get("Range")
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                start, end = (
                    map(int, asked.removeprefix("bytes=").split("-")) if asked else (0, size - 1)
                )
                file.seek(start)
                body = file.read(end + 1 - start)
            self.send_response(206 if asked else 200)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Range", f"bytes {start}-{end}/{size}")
            self.end_headers()
            self.wfile.write(body)
            sent.append(len(body))

        def log_message(self, *arguments: Any) -> None:
            """Silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", sent
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
