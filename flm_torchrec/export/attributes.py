"""Keys, titles and attributes of prepared items and users, by ranges of ids; items of an export by their attributes.

One row group, or one part of an export, is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from flm_torchrec.data.dataset import DOMAIN, PreparedData
from flm_torchrec.data.event_files import as_data_error
from flm_torchrec.data.feature_values import bucket_names
from flm_torchrec.data.schema import Feature
from flm_torchrec.errors import DataError, RunError
from flm_torchrec.export.parts import ATTRIBUTE, ExportRows, single_array
from flm_torchrec.names import COMPARED, nearest, nearest_key


class Keys:
    """Keys of users, or keys, titles and attributes of items, for ascending ranges of ids.

    Raises:
        DataError: a file is missing or unreadable.
    """

    def __init__(self, data: PreparedData, entity: str) -> None:
        self.key = f"{entity}_key"
        self.title = data.schema.title if entity == "item" else ""
        features = [f for f in data.schema.of("item", sparse=True) if f.kind != "text"] if entity == "item" else []
        self.columns = {f.column: ATTRIBUTE + f.name for f in features}
        self.values = {f.column: _vocabulary(data, f) for f in features}
        self.domain = [DOMAIN] if entity == "item" and data.schema.domains else []
        path = data.path / f"{entity}s.parquet"
        with as_data_error(path):
            self.file = pq.ParquetFile(path)
        groups = range(self.file.num_row_groups)
        self.ends = np.cumsum([self.file.metadata.row_group(g).num_rows for g in groups])
        self.row_group: tuple[int, pa.Table] | None = None  # its number, and its rows

    def rows(self, start: int, stop: int) -> dict[str, pa.Array]:
        """Columns [stop - start] of the entities `start:stop`, by name."""
        first, last = np.searchsorted(self.ends, [start, stop - 1], side="right")
        pieces = [self._piece(int(group), start, stop) for group in range(first, last + 1)]
        table = pa.concat_tables(pieces).combine_chunks()
        columns = {self.key: single_array(table[self.key]).cast(pa.string())}
        if self.key == "item_key":
            columns["title"] = columns[self.key]
            if self.title:
                shown = single_array(table[self.title]).cast(pa.string())
                named = pc.and_kleene(pc.is_valid(shown), pc.not_equal(shown, ""))
                columns["title"] = pc.if_else(pc.fill_null(named, False), shown, columns[self.key])
        for column, name in self.columns.items():
            columns[name] = decoded(single_array(table[column]), self.values[column])
        for name in self.domain:
            ends = pa.array(np.arange(len(table) + 1, dtype=np.int32))
            columns[ATTRIBUTE + name] = pa.ListArray.from_arrays(ends, single_array(table[name]).cast(pa.string()))
        return columns

    def _piece(self, group: int, start: int, stop: int) -> pa.Table:
        if self.row_group is None or self.row_group[0] != group:
            wanted = {self.key, *([self.title] if self.title else []), *self.columns, *self.domain}
            self.row_group = group, self.file.read_row_group(group, columns=sorted(wanted))
        table = self.row_group[1]
        begin = int(self.ends[group]) - len(table)
        return table.slice(max(0, start - begin), stop - max(start, begin))


def _vocabulary(data: PreparedData, feature: Feature) -> pa.Array:
    """The values of an item's feature, in order of their codes; of numbers the names of buckets."""
    file = data.path / "vocab" / f"item_{feature.name}.parquet"
    try:
        values = single_array(pq.read_table(file, columns=["code", "value"]).sort_by("code")["value"]).cast(pa.string())
        return pa.array(bucket_names(values.to_pylist()), pa.string()) if feature.kind == "quantile" else values
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: cannot be read ({error}); prepare the data again") from error


def decoded(codes: pa.Array, values: pa.Array) -> pa.ListArray:
    """Codes, one or a list in each row, null where unknown → a list of values in each row, empty where unknown."""
    if pa.types.is_list(codes.type) or pa.types.is_large_list(codes.type):
        lengths, flat = codes.value_lengths().fill_null(0), codes.flatten()
    else:
        lengths, flat = codes.is_valid(), codes.drop_null()
    ends = np.cumsum(lengths.to_numpy(zero_copy_only=False), dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(np.concatenate([np.zeros(1, np.int32), ends])), values.take(flat))


def allowed_items(items: ExportRows, wanted: Mapping[str, Sequence[str]]) -> np.ndarray:
    """[N] bool: the items of an export that have, for each feature, one of the values.

    Raises:
        RunError: there is no such feature, or no item has such a value.
    """
    present = [n.removeprefix(ATTRIBUTE) for n in items.column_names() if n.startswith(ATTRIBUTE)]
    for name, values in wanted.items():
        if name not in present:
            raise RunError(f"filter: no feature '{name}'; {nearest(name, present) if present else 'items have none'}")
        if isinstance(values, str) or not values or not all(isinstance(value, str) for value in values):
            raise RunError(f"filter.{name}: give a list of one value or more, each a text, not {values!r}")
    mask = np.ones(items.count, bool)
    for name, values in wanted.items():
        mask &= _with_value(items, name, list(values))
    return mask


def _with_value(items: ExportRows, name: str, values: list[str]) -> np.ndarray:
    """[N] bool: the items that have one of the values of a feature."""
    parts, known = [], set[str]()
    for table in items.parts([ATTRIBUTE + name]):
        lists = single_array(table[ATTRIBUTE + name])
        flat = lists.flatten()
        hit = pc.is_in(flat, value_set=pa.array(values)).to_numpy(zero_copy_only=False)
        of = np.repeat(np.arange(len(lists)), lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False))
        parts.append(np.bincount(of[hit], minlength=len(lists)) > 0)
        known.update(pc.unique(flat).to_pylist())
    for value in values:
        if value not in known:
            raise RunError(f"filter.{name}: no value '{value}'; {nearest_key(value, sorted(known), COMPARED)}")
    return np.concatenate(parts)
