"""The closing table: each system once, the best first and marked, intervals behind the figures."""

import io
from typing import Any

import pytest
from rich.console import Console

from genrec_dist.evaluation.table import BOUND, format_table

KNN = {"HR@5": 0.0566, "NDCG@5": 0.0421, "HR@10": 0.0789, "NDCG@10": 0.0493}


def printed(rows: list[dict[str, Any]], width: int = 120) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(format_table(rows))
    return console.export_text()


def cells(text: str) -> list[list[str]]:
    lines = [line.split("│")[1:-1] for line in text.splitlines() if "│" in line]
    return [[cell.strip() for cell in line] for line in lines]


def test_each_system_is_there_once_and_the_best_is_first() -> None:
    ours = {"system": "genrec", "HR@5": 0.0601, "NDCG@10": 0.0412}
    ours["beside"] = {"counting": None, "knn": KNN}
    text = printed([ours, {"system": "knn", **KNN}, {"system": "broken"}])
    assert cells(text) == [
        ["knn *", ".0566", ".0421", ".0789", ".0493"],
        ["genrec", ".0601", "–", "–", ".0412"],
        ["broken", "–", "–", "–", "–"],
    ]
    assert "* best NDCG@10" in text
    assert "95 %" not in text


def test_a_bound_is_listed_and_is_not_the_best() -> None:
    rows = [{"system": "oracle", BOUND: True, "NDCG@10": 0.9}, {"system": "knn", **KNN}]
    rows += [{"system": "popularity", "NDCG@10": 0.01}]
    assert [row[0] for row in cells(printed(rows))] == ["oracle", "knn *", "popularity"]


def test_a_system_alone_is_not_called_the_best() -> None:
    text = printed([{"system": "knn", **KNN}])
    assert cells(text)[0][0] == "knn"
    assert "best" not in text


@pytest.mark.parametrize("width", [80, 120])
def test_intervals_are_behind_the_figures_or_below_them(width: int) -> None:
    ci95 = {key: [value - 0.001, value + 0.002] for key, value in KNN.items()}
    text = printed([{"system": "knn", **KNN, "ci95": ci95}, {"system": "x" * 20, **KNN}], width)
    found = cells(text)
    whole = [" ".join(filter(None, column)) for column in zip(*found[:-1], strict=True)]
    assert whole[:2] == ["knn *", ".0566 .0556-.0586"]
    assert len(found) == (3 if width == 80 else 2)
    assert all(len(line) <= width for line in text.splitlines())
    assert "behind each figure its 95 % interval" in " ".join(text.split())
