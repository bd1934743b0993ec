"""Training beside Hugging Face's Trainer and the published collate: real tokens per second."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from genrec_shards.dataset import Dataset
from genrec_shards.storage.write import write_shards
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from genrec_dist.bench.measure import (
    REPEATS,
    Claim,
    Measured,
    format_columns,
    make_claim,
    table,
)
from genrec_dist.bench.synthetic import BEAUTY_ITEMS, BEAUTY_USERS, VOCABULARY, load_or_make
from genrec_dist.bench.train_process import DEFAULT, OURS, PUBLISHED, TRIMMED, TUNED, Setting
from genrec_dist.data.tokenizer import load_tokenizer, train_tokenizer
from genrec_dist.data.word_table import build_words

LONG, CAPPED, CAPPED_ITEMS = "512 tokens", "20 items", 20
SLOW = (DEFAULT, PUBLISHED)
SLOW_STEPS = 8
"""Steps per turn of the slow rivals; their batches are drawn at random, so any few are alike."""
GOALS = {
    LONG: {TUNED: ">= 1.5x", DEFAULT: ">= 5x", PUBLISHED: ">= 8x"},
    CAPPED: {TUNED: ">= 1.25x"},
}


@dataclass(frozen=True)
class Sizes:
    """What is measured; smaller ones are for tests."""

    users: int = BEAUTY_USERS
    """Of the synthetic data that is used where none is given."""
    items: int = BEAUTY_ITEMS
    setting: Setting = field(default_factory=lambda: Setting("", "", ""))
    """Its directories are filled in."""
    tokenizer: int = 300
    """Its tokens in use: with 300 an item has 3.6 sub-words, with BART's about 4."""
    vocabulary: int = VOCABULARY
    """Rows of the embedding and the head; the others are as idle as most of BART's."""
    repeats: int = REPEATS
    rivals: tuple[str, ...] = (OURS, TRIMMED, TUNED, DEFAULT, PUBLISHED)


def bench_train(data: Path | None = None, sizes: Sizes | None = None) -> Measured:
    """The claims and the table of `genrec bench train`. `data`: a directory of `genrec prepare`;
    None: synthetic data of Beauty's size."""
    sizes = sizes or Sizes()
    with tempfile.TemporaryDirectory(prefix="genrec-bench-") as name:
        folder = Path(name)
        dataset = load_or_make(data, folder / "made", sizes.users, sizes.items)
        long = make_setting(dataset, folder, sizes)
        capped = replace(long, max_tokens=tokens_of(CAPPED_ITEMS, dataset, long.tokenizer))
        settings = {LONG: long, CAPPED: capped}
        measured = {name: measure(setting, sizes) for name, setting in settings.items()}
    claims = [claim for name, found in measured.items() for claim in claims_of(name, found)]
    described = {name: asdict(setting) for name, setting in settings.items()}
    more = {"repeats": sizes.repeats, "measured": measured, "settings": described}
    return claims, table("train", claims, **more)


def make_setting(dataset: Dataset, folder: Path, sizes: Sizes) -> Setting:
    """The setting with shards and a tokenizer in `folder`."""
    write_shards(dataset, folder / "shards")
    tokenizer = train_tokenizer(dataset.numbering.item_codes, sizes.tokenizer)
    facts = json.loads(tokenizer.backend_tokenizer.to_str())
    for number in range(len(tokenizer), sizes.vocabulary):
        facts["model"]["vocab"][f"<idle {number}>"] = number
    idle = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(facts)), **tokenizer.special_tokens_map
    )
    idle.save_pretrained(folder / "tokenizer")
    shards, directory = str(folder / "shards"), str(folder / "tokenizer")
    return replace(sizes.setting, data=str(dataset.path), shards=shards, tokenizer=directory)


def tokens_of(num_items: int, dataset: Dataset, tokenizer: str) -> int:
    """Encoder tokens of the longest text of so many items."""
    numbering = dataset.numbering
    words = build_words(load_tokenizer(tokenizer), numbering.item_codes, numbering.user_codes)
    return 3 + words.longest_user + num_items * words.longest_item


def measure(setting: Setting, sizes: Sizes) -> dict[str, dict[str, Any]]:
    """Rival -> its facts and its tokens per second, the rivals taking turns.

    Raises AssertionError if they do not train the same samples from the same weights."""
    with contextlib.ExitStack() as stack:
        # Started one after another: what is compiled is compiled while no other is timed.
        rivals = {name: stack.enter_context(process(name, setting)) for name in sizes.rivals}
        facts = {name: rival.answer() for name, rival in rivals.items()}
        first = next(iter(facts.values()))
        for name, fact in facts.items():
            for key in ("samples", "tokens"):
                assert fact[key] == first[key], (name, fact, first)
            if name != TRIMMED:  # whose softmax has fewer tokens
                assert abs(fact["first loss"] - first["first loss"]) < 1e-3, (name, fact, first)
        steps = setting.num_steps
        turns: dict[str, list[dict[str, float]]] = {name: [] for name in rivals}
        for turn in range(sizes.repeats + 1):
            for name, rival in rivals.items():
                answer = rival.ask(min(steps, SLOW_STEPS) if name in SLOW else steps)
                if turn:  # the first one warms up
                    turns[name].append(answer)
    rates = {
        name: [round(turn["tokens"] / turn["seconds"], 1) for turn in of_rival]
        for name, of_rival in turns.items()
    }
    return {
        name: {
            **facts[name],
            "tokens a second": median(rates[name]),
            "of each turn": rates[name],
            "seconds of a turn": median([turn["seconds"] for turn in turns[name]]),
            "peak memory, GiB": max(turn["memory"] for turn in turns[name]) / 2**30,
        }
        for name in rivals
    }


@dataclass(frozen=True)
class Process:
    """A rival that waits for its turn."""

    process: subprocess.Popen[str]
    name: str
    errors: Path

    def answer(self) -> dict[str, Any]:
        """Its next line. Raises ValueError with its last words if it has ended."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            last_words = self.errors.read_text(encoding="utf-8")[-2000:]
            raise ValueError(f"{self.name}: ended by itself: {last_words}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, num_steps: int) -> dict[str, Any]:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `answer` says why it ended
            self.process.stdin.write(f"{num_steps}\n")
            self.process.stdin.flush()
        return self.answer()


@contextlib.contextmanager
def process(name: str, setting: Setting) -> Iterator[Process]:
    arguments = ["genrec_dist.bench.train_process", name, json.dumps(asdict(setting))]
    with tempfile.NamedTemporaryFile("w+", suffix=".log") as errors:
        command = [sys.executable, "-m", *arguments]
        started = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            encoding="utf-8",
        )
        try:
            yield Process(started, name, Path(errors.name))
        finally:
            started.kill()
            started.communicate()


def claims_of(setting: str, measured: Mapping[str, Mapping[str, Any]]) -> list[Claim]:
    rates = {name: found["tokens a second"] for name, found in measured.items()}
    ours = rates.pop(OURS)
    id, unit = f"training, {setting}", "real tokens/s"
    goals = {peer: GOALS[setting].get(peer, "none") for peer in rates}
    return [make_claim(id, peer, ours, rates[peer], unit, goals[peer]) for peer in rates]


def format_rivals(table: Mapping[str, Any]) -> str:
    """Tokens per second, padding and memory of all, fastest first: plain lines."""
    rows: list[Sequence[str]] = [("setting", "rival", "tokens/s", "padding", "memory")]
    for setting, measured in table["measured"].items():
        for name in sorted(measured, key=lambda rival: -measured[rival]["tokens a second"]):
            found = measured[name]
            figures = f"{found['tokens a second']:,.0f}", f"{found['padding share']:.1%}"
            rows.append((setting, name, *figures, f"{found['peak memory, GiB']:.2f} GiB"))
    return format_columns(rows)
