"""Streaming: decoding and bytes beside one JSON per sample, late resume, waiting, network bytes."""

# U users, n samples

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from genrec_shards.dataset import Dataset
from genrec_shards.sequences import Sequences
from genrec_shards.storage.reader import ShardReader
from genrec_shards.storage.sample_order import SampleOrder, split_among_ranks
from genrec_shards.storage.write import write_shards

from genrec_dist.bench.measure import (
    REPEATS,
    Measured,
    in_turn,
    make_claim,
    table,
    watch_training,
)
from genrec_dist.bench.synthetic import BEAUTY_ITEMS, BEAUTY_USERS, load_or_make, make_data
from genrec_dist.config.load import load_recipe
from genrec_dist.training.loader import StepBatches
from genrec_dist.training.setup import build_setup
from genrec_dist.training.stages import plan_stages

BATCH = 512
PEER = "webdataset 1.0.2, one JSON a sample"


@dataclass(frozen=True)
class Sizes:
    """What is measured; smaller ones are for tests."""

    users: int = BEAUTY_USERS
    """Of the synthetic data that is used where none is given."""
    items: int = BEAUTY_ITEMS
    many_users: int = 200_000
    """Of the epoch that is resumed, and of the one that comes over a network."""
    users_per_record: int = 128
    """Over the network; small, so that there are many more records than a process keeps decoded."""
    train_steps: int = 25
    """Steps of the training run that is watched; 0 leaves it out."""
    repeats: int = REPEATS


def bench_stream(data: Path | None = None, sizes: Sizes | None = None) -> Measured:
    """The claims and the table of `genrec bench stream`. `data`: a directory of `genrec prepare`;
    None: synthetic data of Beauty's size."""
    sizes = sizes or Sizes()
    with tempfile.TemporaryDirectory(prefix="genrec-bench-") as name:
        folder = Path(name)
        dataset = load_or_make(data, folder / "small", sizes.users, sizes.items)
        write_shards(dataset, folder / "shards")
        many = make_data(folder / "many", sizes.many_users, sizes.items)
        write_shards(many, folder / "many" / "data" / "shards")
        measured = {
            "decoding": measure_decoding(dataset.sequences, folder, sizes),
            "resuming": measure_resuming(many, sizes),
            "waiting": ([], {}),
            "network": measure_network(many, folder, sizes),
        }
        if sizes.train_steps:
            measured["waiting"] = measure_waiting(dataset, folder, sizes)
    described = {
        "source": data.name if data else "synthetic",
        "users": dataset.sequences.num_users,
        "interactions": dataset.sequences.num_interactions,
    }
    claims = [claim for found, _ in measured.values() for claim in found]
    more = {name: found for name, (_, found) in measured.items()}
    return claims, table("stream", claims, sizes=vars(sizes), data=described, **more)


# Decoding and bytes.


def write_json_tars(sequences: Sequences, folder: Path, users_per_tar: int = 8192) -> list[str]:
    """Write the peer's layout, a sample per user, `{"user": row, "items": [row, ...]}`: paths."""
    import webdataset as wds

    folder.mkdir()
    paths: list[str] = []
    for first in range(0, sequences.num_users, users_per_tar):
        paths.append(str(folder / f"{len(paths):06d}.tar"))
        with contextlib.closing(wds.TarWriter(paths[-1])) as writer:
            for user in range(first, min(first + users_per_tar, sequences.num_users)):
                items = items_of(sequences, user).tolist()
                writer.write({"__key__": f"{user:09d}", "json": {"user": user, "items": items}})
    return paths


def read_json_tars(paths: list[str]) -> Iterator[dict[str, Any]]:
    """Samples, read as webdataset's documentation does it, without decoders that run a pickle."""
    import webdataset as wds

    for sample in wds.WebDataset(paths, shardshuffle=False):
        yield json.loads(sample["json"])


def read_shards(path: Path, verify: bool) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(user rows, items, offsets) of each step of an epoch in training's order, by a new reader."""
    reader = ShardReader(path, verify=verify)
    order = _order_of(reader)
    for step in range(order.steps_per_epoch):
        users = order.step(0, step).user_rows
        yield users, *reader.gather(users)


def _order_of(reader: ShardReader) -> SampleOrder:
    size = reader.manifest.users_per_record
    return SampleOrder(reader.lengths, size, space="user", batch_size=BATCH, seed=0)


def items_of(sequences: Sequences, user: int) -> np.ndarray:
    return sequences.items[sequences.offsets[user] : sequences.offsets[user + 1]]


def measure_decoding(sequences: Sequences, folder: Path, sizes: Sizes) -> Measured:
    """Samples per second on one core, and bytes, of both layouts."""
    ours, theirs = folder / "shards", write_json_tars(sequences, folder / "json")
    check_same(sequences, ours, theirs)
    readers = {
        "ours": lambda: _drain(read_shards(ours, verify=False)),
        "ours, verified": lambda: _drain(read_shards(ours, verify=True)),
        "theirs": lambda: _drain(read_json_tars(theirs)),
    }
    seconds = in_turn(readers, sizes.repeats)
    rates = {name: sequences.num_users / median(values) for name, values in seconds.items()}
    sizes_of = {
        "tars": sum(path.stat().st_size for path in ours.glob("*.tar")),
        "with manifest and lengths": sum(path.stat().st_size for path in ours.iterdir()),
        "raw": 4 * (sequences.num_interactions + 2 * sequences.num_users),
        "json tars": sum(Path(path).stat().st_size for path in theirs),
    }
    raw = "items + offset + user, 4 B each"
    claims = [
        make_claim("decode", PEER, rates["ours"], rates["theirs"], "samples/s", ">= 30x"),
        make_claim("bytes", raw, sizes_of["tars"], sizes_of["raw"], "B", "<= 1.2x"),
    ]
    return claims, {"seconds": seconds, "samples_per_second": rates, "bytes": sizes_of}


def check_same(sequences: Sequences, ours: Path, theirs: list[str]) -> None:
    """Raises AssertionError unless both layouts give every user's sequence exactly once."""
    # The order leaves out users without a sample; then the two would not decode the same.
    seen_U = np.zeros((2, sequences.num_users), dtype=int)
    for sample in read_json_tars(theirs):
        seen_U[0, sample["user"]] += 1
        assert sample["items"] == items_of(sequences, sample["user"]).tolist()
    for users, items, offsets in read_shards(ours, verify=True):
        seen_U[1, users] += 1
        for place, user in enumerate(users):
            own = items[offsets[place] : offsets[place + 1]]
            assert np.array_equal(own, items_of(sequences, user))
    assert (seen_U == 1).all()


def _drain(values: Iterator[Any]) -> None:
    for _ in values:
        pass


def measure_resuming(dataset: Dataset, sizes: Sizes) -> Measured:
    """Seconds from a fresh reader and order to the first batch, at four places of an epoch."""
    recipe = load_recipe("tiny", [f"data={dataset.path}", f"shards={dataset.path / 'shards'}"])
    setup, _ = build_setup(recipe)
    layout = setup.layout
    num_steps = setup.stages[-1].plan.steps_per_epoch

    def first_batch(step: int) -> None:
        reader = ShardReader(recipe.shards_dir, verify=False)
        StepBatches(plan_stages(recipe, reader), reader, layout, recipe, 0, 1)[step]

    steps = {f"{share} %": num_steps * share // 100 for share in (0, 10, 50, 90)}
    rivals = {name: partial(first_batch, step) for name, step in steps.items()}
    seconds = in_turn(rivals, sizes.repeats)
    late, early = median(seconds["90 %"]), median(seconds["0 %"])
    peer, unit = "the beginning of the epoch", "s to the first batch"
    more = {"seconds": seconds, "steps": steps, "steps_per_epoch": num_steps}
    claims = [make_claim("resume", peer, late, early, unit, "<= 2x")]
    return claims, {**more, "users": dataset.sequences.num_users}


def measure_waiting(dataset: Dataset, folder: Path, sizes: Sizes) -> Measured:
    """The share of a training step in which `genrec train tiny` waits for its batch."""
    settings = {"data": dataset.path, "shards": folder / "shards", "run": folder / "run"}
    steps = watch_training("tiny", settings, sizes.train_steps)
    shares, times = ([step[key] for step in steps] for key in ("data_wait_share", "time"))
    claim = make_claim(
        "wait", "a step of tiny", float(np.mean(shares)), 1.0, "of a step", "<= 0.01"
    )
    more = {"shares": shares, "seconds_a_step": float(np.mean(np.diff(times)))}
    return [claim], {**more, "workers": load_recipe("tiny").workers}


# Bytes over a network.


def measure_network(dataset: Dataset, folder: Path, sizes: Sizes) -> Measured:
    """Bytes that a node fetches in each of two epochs, relative to those of the directory.

    One and two ranks in step, which share a cache on disk of three sizes."""
    shards, per_record = folder / "remote", sizes.users_per_record
    manifest = write_shards(
        dataset, shards, users_per_record=per_record, users_per_shard=64 * per_record
    )
    size = sum(path.stat().st_size for path in shards.iterdir())
    caches = {"larger than the data": 4 * size, "a quarter of the data": size // 4, "none": 0}
    claims, cases = [], {}
    with _serving(shards) as (address, sent):
        for num_ranks in (1, 2):
            for name, cache_bytes in caches.items():
                cache = folder / f"cache-{num_ranks}-{cache_bytes}"
                readers = [
                    ShardReader(address, cache_dir=cache, cache_bytes=cache_bytes)
                    for _ in range(num_ranks)
                ]
                start = time.perf_counter()
                first, second = _two_epochs(readers, sent)
                case = {"amplification": [first / size, second / size]}
                seconds = time.perf_counter() - start
                cases[f"{num_ranks} ranks, cache {name}"] = {**case, "seconds": seconds}
                if cache_bytes > size:
                    id, peer = f"network, {num_ranks} ranks a node", "the shard directory, once"
                    goal = "<= 1.1x in two epochs"
                    claims.append(make_claim(id, peer, first + second, size, "B", goal))
    more = {"bytes": size, "records": manifest.num_records, "decoded_records_a_process": 256}
    return claims, {**more, "cases": cases}


def _two_epochs(readers: list[ShardReader], sent: list[int]) -> list[int]:
    """Bytes sent in each of two epochs; manifests and lengths count to the first."""
    order, fetched = _order_of(readers[0]), [0]
    for epoch in range(2):
        for step in range(order.steps_per_epoch):
            samples = order.step(epoch, step)
            for rank, reader in enumerate(readers):
                reader.gather(split_among_ranks(samples, rank, len(readers)).user_rows)
        fetched.append(sum(sent))
    sent.clear()
    return np.diff(fetched).tolist()


@contextlib.contextmanager
def _serving(folder: Path) -> Iterator[tuple[str, list[int]]]:
    """(address, bytes of each answer so far) of a loopback server of this directory that honours
    Range."""
    sent: list[int] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # or a body waits 40 ms after its head

        def do_GET(self) -> None:
            path, wanted = folder / Path(self.path).name, self.headers.get("Range")
            with path.open("rb") as file:
                start, end = 0, (size := os.fstat(file.fileno()).st_size) - 1
                if wanted:
                    start, end = map(int, wanted.removeprefix("bytes=").split("-"))
                file.seek(start)
                body = file.read(end + 1 - start)
            self.send_response(206 if wanted else 200)
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
