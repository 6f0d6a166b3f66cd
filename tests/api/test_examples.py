"""The examples' logs can be prepared, and have what their first lines say."""

from __future__ import annotations

import importlib
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import polars as pl
import pytest

import flm_torchrec as flm
from tests.conftest import ROOT

FIELDS = ("retail", "social_media", "education", "entertainment", "finance")


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")


def made(name: str) -> Any:
    return importlib.import_module(name).make(60, 0)


@pytest.mark.parametrize("name", FIELDS)
def test_an_examples_logs_are_prepared_whole(name: str, tmp_path: Path) -> None:
    example = made(name)
    data = flm.prepare(example.events, tmp_path / "data", items=example.items, **example.prepare)
    assert data.report["users"] == 60 and data.report["items_without_features"] == 0
    dropped = sum(reason["rows"] for reason in data.report["dropped"].values())
    assert dropped == len(example.events) - data.report["rows_kept"] < 0.2 * len(example.events)
    assert made(name).events.equals(example.events), "the same seed gives the same logs"


def test_what_goes_with_a_purchase_follows_it() -> None:
    example = made("retail")
    kinds = importlib.import_module("retail").CATEGORIES
    rows = example.events.join(example.items, on="item_id", maintain_order="left").sort("user_id", "timestamp")
    pairs = [(one, two) for one, two in pairwise(rows.rows(named=True)) if one["user_id"] == two["user_id"]]

    def share(event: str) -> float:
        hit = [kinds.index(a["category"]) ^ 1 == kinds.index(b["category"]) for a, b in pairs if a["event"] == event]
        return sum(hit) / len(hit)

    assert share("buy") > 2 * share("view")


def test_levels_rise_only_after_a_good_mark() -> None:
    rows = made("education").events.with_columns(
        subject=pl.col("item_id").str.extract(r"^(\w+)-"), level=pl.col("item_id").str.extract(r"-(\d)-").cast(int)
    )
    for _, of_one in rows.group_by("user_id", "subject"):
        for before, after in pairwise(of_one.sort("timestamp").rows(named=True)):
            assert after["level"] == min(5, before["level"] + (before["mark"] >= 60))


def test_posts_die_after_two_days() -> None:
    lived = made("social_media").events.group_by("item_id").agg(pl.col("timestamp").max() - pl.col("timestamp").min())
    assert lived["timestamp"].max() <= 2 * 86_400


def test_the_page_names_every_example() -> None:
    named = re.findall(r"^\| `(\w+)\.py`", (ROOT / "examples" / "README.md").read_text(), re.MULTILINE)
    scripts = {file.stem for file in (ROOT / "examples").glob("*.py")} - {"simulation"}
    assert tuple(named) == FIELDS and set(FIELDS) == scripts
