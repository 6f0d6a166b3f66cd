"""The tables of an evaluation, on the terminal and in Markdown."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest

from flm_torchrec.evaluation.evaluate import Evaluation
from flm_torchrec.evaluation.paired import Comparison, Difference
from flm_torchrec.evaluation.report import markdown, show, show_comparison
from flm_torchrec.terminal import PlainConsole

FOUND = Evaluation(
    "test", 4, {"fused": {"hr@10": 0.5, "mrr": 0.25}}, {"content": {"fused": {"hr@10": 0.75, "mrr": 0.5}}}
)
ORACLE = {"all": {"hr@10": 0.8765}, "content": {"hr@10": 0.9876}, "only_content": {"hr@10": 0.1234}}


def shown(oracle: dict[str, dict[str, float]] | None) -> str:
    text = io.StringIO()
    show(FOUND, PlainConsole(file=text, width=120), oracle)
    return text.getvalue()


def test_the_oracle_is_a_row_of_the_table_of_all_and_of_each_segment() -> None:
    everyone, content = shown(ORACLE).split("of these, 'content'")
    assert "oracle of the mixture" in everyone and "0.8765" in everyone
    assert "oracle of the mixture" in content and "0.9876" in content
    assert "0.1234" not in everyone + content
    assert markdown(FOUND, ORACLE).splitlines() == [
        "| test | hr@10 | mrr |", "|---|---|---|", "| fused | 0.5000 | 0.2500 |",
        "| oracle of the mixture | 0.8765 |  |", "",
        "| content | hr@10 | mrr |", "|---|---|---|", "| fused | 0.7500 | 0.5000 |",
        "| oracle of the mixture | 0.9876 |  |",
    ]  # fmt: skip


def test_without_an_oracle_no_row_is_added() -> None:
    assert "oracle" not in shown(None) + markdown(FOUND)
    assert "oracle" not in shown({"other": {"hr@10": 1.0}}) + markdown(FOUND, {})
    assert list(FOUND.table) == ["fused"]  # what is written to evaluation-SPLIT.json


def test_what_is_left_out_is_told_below_the_tables() -> None:
    noted = replace(FOUND, notes=["EASE-R is left out"])
    text = io.StringIO()
    show(noted, PlainConsole(file=text, width=120))
    assert text.getvalue().splitlines()[-1] == markdown(noted).splitlines()[-1] == "EASE-R is left out"


@pytest.mark.parametrize("width", [40, 80, 120])
def test_no_number_is_cut_however_narrow_the_output_is(width: int) -> None:
    columns = [f"{name}@{k}" for k in (5, 10, 20) for name in ("novelty", "recall", "precision", "map")]
    lists = {
        row: {c: start + place for place, c in enumerate(columns)} for row, start in (("a", 1000.25), ("b", 77.75))
    }
    differences = {"a": {c: Difference(place / 100, -0.5, 0.5) for place, c in enumerate(columns)}}
    text = io.StringIO()
    console = PlainConsole(file=text, width=width)
    show(replace(FOUND, lists=lists), console)
    show_comparison(Comparison("b", 4, differences), console)
    found = text.getvalue()
    assert all(found.count(f" {value:.4f} ") == 1 for row in lists.values() for value in row.values())
    assert all(found.count(f"{place / 100:+.4f} [-0.5000, +0.5000]") == 1 for place in range(len(columns)))
    assert all(len(line) <= width for line in found.splitlines())
