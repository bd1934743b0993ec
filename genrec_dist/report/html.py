"""The HTML shell of the reports: one self-contained file, its parts, and the escaping of text."""

import base64
import hashlib
from collections.abc import Iterable
from html import escape
from importlib import resources
from typing import Any


def page(title: str, sections: Iterable[str], style: str = "", script: str = "") -> str:
    """A whole document of the sections that are not empty, in the house's style and then `style`.

    It may load nothing and run nothing but `script`, which the policy knows by its hash, whatever a
    name in it may say."""
    style = (resources.files("genrec_dist") / "report.css").read_text(encoding="utf-8") + style
    runs, code = "", ""
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
        runs, code = f"; script-src 'sha256-{digest}'", f"<script>{script}</script>"
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:{runs}"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)} · GenRec</title><style>{style}</style></head>\n<body><main>\n"
        + "\n".join(section for section in sections if section)
        + f"\n</main>{code}</body></html>\n"
    )


def grid(columns: Iterable[str], rows: Iterable[str]) -> str:
    """A table that scrolls sideways where the page is narrow; columns and rows are HTML."""
    head = "".join(f'<th scope="col">{name}</th>' for name in columns)
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody>'
        "</table></div>"
    )


def definitions(pairs: Iterable[tuple[str, Any]], kind: str) -> str:
    """Names with their values; `kind` is the list's class."""
    rows = "".join(
        f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in pairs
    )
    return f'<dl class="{kind}">{rows}</dl>'


def table_row(name: str, cells: Iterable[str], ours: bool = False) -> str:
    """A row of `grid`; cells are HTML. `ours`: the row that stands out."""
    inside = "".join(f"<td>{cell}</td>" for cell in cells)
    return f'<tr{" class=ours" if ours else ""}><th scope="row">{text(name)}</th>{inside}</tr>'


def percent(share: float) -> str:
    return f"{share:.1%}".replace("%", " %")


def duration(seconds: float) -> str:
    """Seconds as people say them: 2 h 5 min, 3 min 20 s, 12 s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes} min"
        if hours
        else f"{minutes} min {rest} s"
        if minutes
        else f"{rest} s"
    )


def text(value: Any) -> str:
    """The text, escaped; everything from a file goes through here into a page."""
    return escape(str(value), quote=True)
