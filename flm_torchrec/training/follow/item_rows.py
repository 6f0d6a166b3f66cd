"""Features of items as people write them → rows of items.parquet, by the values that a run's data have codes for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from flm_torchrec.data.event_files import as_data_error
from flm_torchrec.data.feature_values import FeatureValues, codes_of, describe, numbers_of
from flm_torchrec.data.keys import json_text, stripped
from flm_torchrec.data.schema import Feature, Schema
from flm_torchrec.errors import DataError
from flm_torchrec.folders import SCHEMA
from flm_torchrec.prepare.options import TextForm
from flm_torchrec.prepare.sources.lists import values_of

LISTS = ("multi_categorical", "text")
"""Kinds of which an item has several codes."""
CLOSE = 1e-5
"""Numbers that differ by less are the same: preparation standardises them in another order."""


class ItemRows:
    """Encodes features of items that the data lack.

    Args:
        folder: prepared data of the run.
        followed: folder with the items.parquet that a follower of the run wrote, if there is one.

    Raises:
        DataError: a file of the data is missing or broken.
    """

    def __init__(self, folder: Path, followed: Path) -> None:
        self.file = folder / "items.parquet"
        self.followed = followed
        self.schema = Schema.load(folder / SCHEMA)
        with as_data_error(self.file):
            self.columns = pq.read_schema(self.file).remove_metadata()
        features = [f for f in self.schema.features if f.entity == "item"]
        self.features = [(f, FeatureValues.described(describe(folder, f))) for f in features]
        title = self.schema.title
        self.names = [f.name for f in features]
        self.texts = [n for n in dict.fromkeys([*self.names, title]) if n and _is_text(self._type(n))]
        """Columns that hold a text as it was given."""
        self.given_names = list(dict.fromkeys([*self.names, *self.texts]))

    def row(self, given: Mapping[str, Any], left_out: list[str] | None = None) -> dict[str, Any]:
        """The columns of items.parquet for an item, but for id and key; None where nothing is given.

        A value without a code is left out, as `flm prepare` leaves out rare values.

        Args:
            left_out: gets a line for each such value.

        Raises:
            DataError: a value does not fit its kind.
        """
        shown = self.schema.title
        if shown and "title" not in self.names and given.get(shown) is None:
            given = {**given, shown: given.get("title")}  # as `flm export-events` writes the title of a posted item
        row: dict[str, Any] = {n: stripped(given[n]) for n in self.texts if isinstance(given.get(n), str)}
        for feature, values in self.features:
            value = _as_kind(feature, given.get(feature.name))
            row[feature.column] = _encoded(feature, values, value, [] if left_out is None else left_out)
        return row

    def table(self, ids: Iterable[int], items: list[tuple[str, dict[str, Any]]]) -> pa.Table:
        """Ids, keys and rows of items with the columns of items.parquet."""
        rows = [{"item_id": n, "item_key": key, **row} for n, (key, row) in zip(ids, items, strict=True)]
        return pa.Table.from_pylist(rows, schema=self.columns)

    def known(self, wanted: list[str]) -> dict[str, dict[str, Any]]:
        """By key, the rows of those items that the data have, or that came in since."""
        grown = self.followed / "items.parquet" if (self.followed / "report.json").is_file() else self.file
        if not wanted:
            return {}
        with as_data_error(grown):
            table = pq.read_table(grown, filters=[("item_key", "in", wanted)])
        return {row["item_key"]: row for row in table.to_pylist()}

    def awaits(self, known: Mapping[str, Any]) -> bool:
        """Whether a known item came in since, and without features."""
        return known["item_id"] >= self.schema.items and is_bare(known)

    def differs(self, given: Mapping[str, Any], row: Mapping[str, Any], known: Mapping[str, Any]) -> str:
        """A feature that is given and is not that of the known item, for people; empty where there is none."""
        for feature, values in self.features:
            if given.get(feature.name) is not None and not _same(row[feature.column], known[feature.column]):
                there = _values(values, known[feature.column])
                return feature.name + (f" ({given[feature.name]!r:.60}, not {there!r:.60})" if there else "")
        return ""

    def _type(self, name: str) -> pa.DataType:
        place = self.columns.get_field_index(name)
        return pa.null() if place < 0 else self.columns.field(place).type


def is_bare(row: Mapping[str, Any]) -> bool:
    """Whether a row of items.parquet says nothing of its item but the key."""
    return all(value in (None, "", []) for name, value in row.items() if name not in ("item_id", "item_key"))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _as_kind(feature: Feature, value: Any) -> Any:
    """A value of a file, where numbers and lists may be text and keys may be numbers, as its kind wants it.

    A number that is not finite is no value, and makes a vector none, as for `flm prepare`.
    """
    if isinstance(value, str) and feature.kind in ("multi_categorical", "dense"):
        value = values_of(value, TextForm(), f"features.{feature.name}")
    values = value if isinstance(value, list) else [value]
    if feature.kind in ("categorical", "multi_categorical"):
        values = [json_text(v) for v in values if not _missing(v)]
    elif feature.kind != "text":
        values = [_number(feature, v) for v in values]
        if any(v is None or (isinstance(v, float) and not math.isfinite(v)) for v in values):
            return None
    return values if isinstance(value, list) else next(iter(values), None)


def _missing(value: Any) -> bool:
    return value is None or value != value or (isinstance(value, str) and not stripped(value))


def _number(feature: Feature, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return float(value) if value.strip() else None
    except ValueError as error:
        raise DataError(f"features.{feature.name}: '{value[:40]}' is no number") from error


def _encoded(feature: Feature, values: FeatureValues, given: Any, left_out: list[str]) -> Any:
    if not feature.sparse:
        numbers = None if given is None else numbers_of(values, given)
        return numbers[0] if numbers and feature.kind == "numeric" else numbers
    codes = list(codes_of(values, given, left_out))
    if feature.kind in LISTS:
        return codes
    return codes[0] if codes else None


def _values(feature: FeatureValues, codes: Any) -> list[str]:
    """The values of codes, of a categorical kind."""
    if feature.kind not in ("categorical", "multi_categorical"):
        return []
    return [feature.values[code] for code in (codes if isinstance(codes, list) else [codes]) if code is not None]


def _same(row: Any, known: Any) -> bool:
    if isinstance(row, float) and isinstance(known, float):
        return abs(row - known) < CLOSE * max(1.0, abs(known))
    if isinstance(row, list) and isinstance(known, list):
        if not (row and known and isinstance(row[0], float)):
            return sorted(row) == sorted(known)
        return len(row) == len(known) and all(map(_same, row, known))
    return bool(row == known)
