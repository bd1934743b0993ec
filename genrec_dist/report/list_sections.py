"""The parts of a run's page about single items and users: what is listed most, and examples of hits
and misses."""

from __future__ import annotations

from html import unescape
from pathlib import Path

from genrec_dist.report.html import grid, percent, text
from genrec_dist.report.list_examples import (
    LATEST,
    LISTED,
    OF_EACH,
    Example,
    ListExamples,
    read_list_examples,
)
from genrec_dist.report.run_files import RunFiles, is_number

LONGEST = 80
"""Characters of a title that are shown."""


def list_sections(run: RunFiles, data: Path | None) -> str:
    """Both parts, of the lists that the page's first metrics were computed from; "" without lists.

    Args:
        run: the run.
        data: its data directory; None where nothing names it.
    """
    if not run.metrics:
        return ""
    split, metrics = next(iter(run.metrics.items()))
    top = metrics.get("top", 20)
    lists = run.path / f"top{top}-{split}.parquet"
    if not is_number(top) or not lists.is_file():
        return ""
    if data is not None and not (data / "items.parquet").is_file():
        run.notes.append(
            f"{data}: no data directory there now, so the examples have no histories: "
            "`genrec report RUN --data DIR`"
        )
    folders = [folder for folder in (data, run.path / "best") if folder is not None]
    found = read_list_examples(lists, split, folders, run.notes)
    return "" if found is None else _most_listed(found, split) + _examples(found, split)


def _most_listed(found: ListExamples, split: str) -> str:
    if not found.most_listed:
        return ""
    longest = found.most_listed[0].lists
    rows = [
        f'<tr><th scope="row">{_name(listed.item, found)}</th>'
        + "".join(
            f'<td class="bars">{percent(count / found.users)}'
            f'<i class="bar" style="width:{min(100 * count / longest, 100):.1f}%"></i></td>'
            for count in (listed.lists, listed.targets)
        )
        + "</tr>"
        for listed in found.most_listed
    ]
    columns = "item", f"in lists of {LISTED}", "taken next"
    return (
        f"<section><h2>Items that are listed most on {text(split)}</h2>"
        f'<div class="items">{grid(columns, rows)}</div><p class="small">Shares of {found.users:,} '
        f"users: in whose first {LISTED} places the item is, and who took it next.</p></section>"
    )


def _examples(found: ListExamples, split: str) -> str:
    if not found.examples:
        return ""
    parts = [
        f'<h3>{name}</h3><div class="users">{"".join(_user(one, found) for one in chosen)}</div>'
        for name, chosen in (
            ("Hits", [one for one in found.examples if one.is_hit]),
            ("Misses", [one for one in found.examples if not one.is_hit]),
        )
        if chosen
    ]
    rate = percent(found.hits / found.users)
    return (
        f"<section><h2>Users and their lists on {text(split)}</h2>"
        f'<p class="small">Drawn at random, up to {OF_EACH} of the {rate} of users whose next item '
        f"is among their first {LISTED}, and up to {OF_EACH} of the others. Rows are those of "
        f"{text(found.name)}.</p>{''.join(parts)}</section>"
    )


def _user(one: Example, found: ListExamples) -> str:
    place = f"next item at place {one.rank}" if one.rank else "next item not listed"
    history = ""
    if one.length is not None:
        older = one.length - len(one.history)
        heading = f"History, {one.length:,} item{'s' * (one.length != 1)}"
        if older:
            heading += f", the latest {LATEST}"
        shown = "".join(f"<li>{_name(item, found)}</li>" for item in one.history)
        history = f'<h5>{heading}</h5><ol class="plain">{shown}</ol>'
    listed = []
    for item in one.items:
        name = "<em>a text that is no item</em>" if item is None else _name(item, found)
        if item == one.target:
            name = f"<mark>{name}</mark> <small>taken next</small>"
        listed.append(f"<li>{name}</li>")
    missed = "" if one.is_hit else f"<h5>Taken next</h5><p>{_name(one.target, found)}</p>"
    return (
        f"<article><h4>Row {one.row:,}: {place}</h4>{history}<h5>List</h5>"
        f"<ol>{''.join(listed)}</ol>{missed}</article>"
    )


def _name(item: str, found: ListExamples) -> str:
    """The item's title and, small, its id; the id alone where there is no title."""
    # Titles of shops often are pieces of their pages: "Smooth &amp; Silky".
    title = " ".join(unescape(found.titles.get(item, "")).split())
    if not title:
        return text(item)
    cut = title if len(title) <= LONGEST else title[: LONGEST - 3] + "..."
    return f"{text(cut)} <small>{text(item)}</small>"
