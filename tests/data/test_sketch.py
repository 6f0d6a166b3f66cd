"""Sketches of items: about as alike as their features, the same in all data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

import flm_torchrec as flm
from flm_torchrec.data.dataset import PreparedData, Ragged, load_prepared
from flm_torchrec.data.sketch import Sketches, kept_bytes, rarity
from flm_torchrec.data.splits import split
from flm_torchrec.errors import DataError
from flm_torchrec.evaluation.baselines import ContentKNN


def test_products_are_about_the_cosines_of_features(small: PreparedData) -> None:
    """As content-kNN has them; the error falls with the root of the width."""
    exact = ContentKNN(small, split(small, "leave-one-out", 0.1).valid).content
    cosines = (exact @ exact.T).toarray()
    errors = []
    for width in (100, 6400):
        found = Sketches(small, width).of(np.arange(small.schema.items))
        assert found.shape == (small.schema.items, width) and found.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
        errors.append(np.sqrt(np.mean((found @ found.T - cosines) ** 2)))
    assert errors[0] < 0.12 and errors[1] < errors[0] / 4


def test_rarity_counts_an_item_once() -> None:
    """However often a value is among its values; a value of no item is as rare as one of a single item."""
    held = Ragged(np.array([0, 3, 3, 4, 5]), np.array([2, 0, 2, 2, 1]))
    np.testing.assert_allclose(rarity(held, 4), np.log1p(4 / np.array([1, 1, 2, 1])), rtol=1e-6)
    np.testing.assert_allclose(rarity(Ragged(np.zeros(3, np.int64), np.zeros(0, np.int64)), 2), np.log1p(2), rtol=1e-6)


@pytest.mark.parametrize("most", [0, 2**20])
def test_items_of_a_batch_have_the_sketches_that_they_have_among_all(
    small: PreparedData, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """Whether sketches are made once or in every batch."""
    monkeypatch.setattr("flm_torchrec.data.sketch.KEPT_BYTES", most)
    sketches, items = Sketches(small, 24), small.schema.items
    ids = np.array([7, 3, 99, 3])
    kept = sketches.growth
    found = sketches.of(ids)
    assert kept == kept_bytes(items, 24) == (4 * 24 * items if most else 0)
    assert sketches.growth == max(0, kept - 3 * 4 * 24)
    np.testing.assert_allclose(found, Sketches(small, 24).of(np.arange(100))[ids], atol=1e-6)
    np.testing.assert_allclose(found, sketches.of(np.arange(100))[ids], atol=1e-6)
    assert sketches.of(ids[:0]).shape == (0, 24)
    assert Sketches(small, 0).of(ids).shape == (4, 0)


def prepared(folder: Path, items: dict[str, list[object]]) -> PreparedData:
    count = len(items["item"])
    events = pl.DataFrame({"user_id": ["a", "b"] * count, "item_id": items["item"] * 2, "timestamp": range(2 * count)})
    kinds = {"brand": "categorical", "words": "text"}
    flm.prepare(events, folder, items=pl.DataFrame(items), item_key="item", item_features=kinds, min_count=1)
    return load_prepared(folder)


def test_a_value_says_the_same_under_another_code(tmp_path: Path) -> None:
    """Two data sets give the codes of values in another order; an item without features has a sketch of zeros."""
    one = prepared(tmp_path / "one", {"item": ["x", "y"], "brand": ["acme", "zeta"], "words": ["red hat", "blue hat"]})
    other = prepared(
        tmp_path / "other",
        {"item": ["q", "r", "s", "t"], "brand": [None, "zeta", "acme", "zeta"], "words": [None, "hat", "hat", "hat"]},
    )
    rows = {}
    for data in (one, other):
        codes = dict(zip(pl.read_parquet(data.path / "vocab/item_brand.parquet")["value"], range(9), strict=False))
        sketches = Sketches(data, 32)
        rows[data.path] = np.sign(sketches.rows("brand", np.array([codes["acme"], codes["zeta"]])))
    np.testing.assert_array_equal(*rows.values())
    assert not np.array_equal(*rows[one.path])
    nothing = other.item_keys.index("q")
    found = Sketches(other, 32).of(np.arange(4))
    assert not found[nothing].any() and found[1 - min(nothing, 1)].any()


def test_a_feature_without_values_has_a_row_as_any_other(tmp_path: Path) -> None:
    """An export asks for the rows of all codes of a feature, though no item has one."""
    data = prepared(tmp_path, {"item": ["x", "y"], "brand": [None, None], "words": ["red hat", "blue hat"]})
    [brand] = [feature for feature in data.schema.of("item", sparse=True) if feature.name == "brand"]
    sketches = Sketches(data, 32)
    assert sketches.rows("brand", np.arange(brand.cardinality)).shape == (1, 32) == (brand.cardinality, 32)
    assert sketches.of(np.arange(2)).any(1).all()


def test_a_vocabulary_that_is_missing_is_told(small: PreparedData, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="vocab"):
        Sketches(replace(small, path=tmp_path), 8)
