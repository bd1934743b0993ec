"""What `prepare` says of the data that it made: lines for a person."""

from __future__ import annotations

from dataclasses import asdict
from datetime import timedelta

from genrec_shards.cleaning.left_out import left_out
from genrec_shards.cleaning.published_sizes import check_expected
from genrec_shards.dataset import Dataset
from genrec_shards.histories import MANY_TIES, tied_targets
from genrec_shards.timestamps import EPOCH


def prepare_summary(dataset: Dataset) -> list[str]:
    """What the source was recognised as, what was left out of a log and why, and the first lines
    that could not be read."""
    info, lines = dataset.info, []
    if info.read_as is not None:
        lines.append(f"{info.source.name} was read as {info.read_as}")
    if info.read is not None:
        kept = info.interactions - sum(entry.interactions for entry in info.appended or ())
        details = {} if info.cleaned is None else asdict(info.cleaned)
        out = left_out(info.dropped, details)
        out = f"left out: {out}" if out else "none left out"
        lines.append(f"{info.read:,} rows read, {kept:,} kept{_dates(dataset)}; {out}")
    if info.global_time is not None:
        lines.append(info.global_time.summary())
    if info.expected is not None:
        lines.append(check_expected(info.expected, dataset.sequences, info.source.name))
    return [*lines, *dataset.bad_lines]


def append_summary(dataset: Dataset) -> list[str]:
    """What the last source that was appended was recognised as and has added, what was left out of
    it, and lines that could not be read."""
    assert dataset.info.appended
    entry = dataset.info.appended[-1]
    read = "" if entry.read is None else f"{entry.read:,} rows read, "
    new = f"{entry.users:,} new users, {entry.items:,} new items"
    out = left_out(entry.dropped, {"k_core": entry.k_core, "min_length": entry.min_length})
    out = f"; left out: {out}" if out else ""
    added = f"{entry.source.name}: {read}{entry.interactions:,} appended, {new}{out}"
    recognised = f"{entry.source.name} was read as {entry.read_as}"
    return [recognised, added, *dataset.bad_lines]


def text_summary(dataset: Dataset) -> str | None:
    """How many items have a text, and how many a title; None where no file of items was given."""
    found = dataset.descriptions
    if found is None:
        return None
    count, total = found.num_described, len(found.texts)
    share = "all" if count == total else f"{count:,} ({in_percent(count / total)})"
    titles = "" if found.titles is None else f", {sum(map(bool, found.titles)):,} a title"
    return f"{found.name}: {share} of {total:,} items have a text{titles}"


def tie_summary(dataset: Dataset) -> tuple[str, bool]:
    """How many users' targets share their time with other items, and whether these are so many that
    it is a warning."""
    if dataset.timestamps is None:
        return "No times: each user's items are in the order of the file.", False
    shares = tied_targets(dataset.sequences, dataset.timestamps)
    if not any(shares.values()):
        return "No user has held-out items that share a timestamp with others.", False
    drawn = "their order is drawn at random (`--ties keep` takes the file's)"
    kept = "their order is the file's (`--ties shuffle` draws it at random)"
    found = (
        f"{in_percent(shares['test'])} of users have held-out items (test; validation: "
        f"{in_percent(shares['validation'])}) that share a timestamp with others; "
        f"{kept if dataset.info.ties == 'keep' else drawn}."
    )
    if shares["test"] <= MANY_TIES:
        return found, False
    return f"Warning: {found} For so many users the time does not say which item came last.", True


def in_percent(share: float) -> str:
    """`44 %`; below ten per cent with one decimal."""
    return f"{100 * share:.{0 if share >= 0.095 else 1}f} %"


def _dates(dataset: Dataset) -> str:
    """The first and the last day of the rows that stay."""
    if dataset.timestamps is None or not len(dataset.timestamps):
        return ""
    first, last = (
        (EPOCH + timedelta(microseconds=int(found))).date()
        for found in (dataset.timestamps.min(), dataset.timestamps.max())
    )
    return f" (from {first} to {last})"
