"""Removing users from prepared data; the ids of all others stay what they are."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from flm_torchrec.data.dataset import fingerprint_of, read_report
from flm_torchrec.data.event_files import as_data_error
from flm_torchrec.data.history import CONTEXT
from flm_torchrec.data.keys import HASHED, tombstone
from flm_torchrec.data.schema import Feature, Schema
from flm_torchrec.errors import DataError
from flm_torchrec.files import replacing, write_text
from flm_torchrec.folders import SCHEMA
from flm_torchrec.names import closest


def keys_and_ids(file: Path) -> tuple[list[str], np.ndarray]:
    """The keys of a users.parquet, and [users] int64 their ids."""
    source = _opened(file)
    if missing := {"user_id", "user_key"} - set(source.schema_arrow.names):
        raise DataError(f"{file}: no column '{min(missing)}'; prepare the data again")
    table = source.read(["user_id", "user_key"])
    return table["user_key"].to_pylist(), table["user_id"].to_numpy()


def forgotten_users(file: Path) -> np.ndarray:
    """[n] int64: ids whose key in the users.parquet is a tombstone."""
    keys, ids = keys_and_ids(file)
    return np.array([i for key, i in zip(keys, ids.tolist(), strict=True) if key == tombstone(i)], np.int64)


def which_id(key: str, hashed: bool, known: list[str]) -> str:
    """A hint which id is asked for in place of an unknown key: the known ones closest to it, or how to hash it.

    Args:
        hashed: the key was hashed for this.
    """
    if known and all(map(HASHED.fullmatch, known)):
        if not HASHED.fullmatch(key):
            return "ids there are hashed: give the id as the source has it, and --key-file FILE with the secret"
        return "ids there are hashed: check the id, and that the secret is the one they were hashed with"
    if hashed:
        return "ids there are not hashed: leave out --key-file"
    close = closest(key, known, 3, cutoff=0.6) or known[:1]
    return f"nearest: {', '.join(close)}"


def forget_rows(folder: Path, keys: Iterable[str]) -> dict[str, int]:
    """Rewrite prepared data without these users, and replace the folder by the new one.

    Their interactions are removed. Their rows in users.parquet stay, empty and with a tombstone for a key, so that no
    id shifts. A value of a feature of users or of events that nobody else has is removed from the vocabulary. Claim the
    folder first.

    Returns the number of "users" and of "events" that were removed.

    Raises:
        DataError: a file is missing or corrupt, nobody would be left, or it cannot be written; nothing is changed.
    """
    gone = set(keys)
    all_keys, ids = keys_and_ids(folder / "users.parquet")
    users = ids[[key in gone for key in all_keys]]
    before = fingerprint_of(folder)
    report = read_report(folder)
    schema = Schema.load(folder / SCHEMA)
    try:
        with replacing(folder) as fresh:
            (fresh / "interactions").mkdir()
            used = {f.name: np.zeros(f.cardinality, bool) for f in schema.of("event", sparse=True)}
            kept = sum(_copy_events(f, fresh / "interactions", users, used) for f in _event_files(folder))
            if kept == 0:
                raise DataError(f"{folder}: holds no events but those of these users; delete the folder instead")
            shutil.copy(folder / "items.parquet", fresh)
            used |= _copy_users(folder, fresh, schema, users)
            _copy_vocabularies(folder, fresh, schema, used)
            counts = {"users": len(users), "events": schema.interactions - kept}
            write_text(fresh / "report.json", json.dumps(_without(report, gone, counts, before), indent=2))
            replace(schema, interactions=kept).save(fresh / SCHEMA)
    except (OSError, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise DataError(f"{folder}: not rewritten ({reason}); what was there is kept") from error
    return counts


def unused_codes(folder: Path, features: Sequence[Feature]) -> np.ndarray:
    """[n] codes that no user has in any of these user features, which share a table."""
    used = np.zeros(max(f.cardinality for f in features), bool)
    for batch in _opened(folder / "users.parquet").iter_batches(columns=list({f.column for f in features})):
        for column in batch.columns:
            used[_codes(column)] = True
    return np.flatnonzero(~used)


def _opened(file: Path) -> pq.ParquetFile:
    if not file.is_file():
        raise DataError(f"{file}: not found; prepare the data again")
    with as_data_error(file):
        return pq.ParquetFile(file)


def _event_files(folder: Path) -> list[Path]:
    return sorted((folder / "interactions").glob("*.parquet"))


def _writer(target: Path, source: pq.ParquetFile) -> pq.ParquetWriter:
    groups = source.metadata.num_row_groups
    compression = source.metadata.row_group(0).column(0).compression.lower() if groups else "snappy"
    return pq.ParquetWriter(target, source.schema_arrow, compression=compression.replace("uncompressed", "none"))


def _copy_events(file: Path, target: Path, users: np.ndarray, used: Mapping[str, np.ndarray]) -> int:
    """Copy the rows of other users → their number; a file without any is not written.

    Args:
        used: by feature of events, [cardinality] bool: codes that rows have; those of the copied rows are marked.
    """
    source = _opened(file)
    kept = 0
    with _writer(target / file.name, source) as writer:
        for number in range(source.num_row_groups):
            rows = source.read_row_group(number)
            rows = rows.filter(pc.invert(pc.is_in(rows["user_id"], pa.array(users))))
            if len(rows):
                writer.write_table(rows, row_group_size=len(rows))
            for name, codes in used.items():
                here = rows[f"{CONTEXT}{name}"].to_numpy()
                codes[here[here >= 0]] = True
            kept += len(rows)
    if kept == 0:
        (target / file.name).unlink()
    return kept


def _copy_users(folder: Path, fresh: Path, schema: Schema, users: np.ndarray) -> dict[str, np.ndarray]:
    """Write users.parquet with the rows of `users` emptied → by feature, [cardinality] bool: codes still used."""
    source = _opened(folder / "users.parquet")
    coded = [f for f in schema.of("user", sparse=True) if f.kind != "text"]
    used = {f.name: np.zeros(f.cardinality, bool) for f in coded}
    with _writer(fresh / "users.parquet", source) as writer:
        for number in range(source.num_row_groups):
            rows = source.read_row_group(number).combine_chunks()
            gone = pc.is_in(rows["user_id"], pa.array(users))
            columns = [_emptied(rows, name, gone) for name in rows.column_names]
            rows = pa.table(columns, schema=source.schema_arrow)
            for feature in coded:
                used[feature.name][_codes(rows[feature.column].combine_chunks())] = True
            if len(rows):
                writer.write_table(rows, row_group_size=len(rows))
    return used


def _emptied(rows: pa.Table, name: str, gone: pa.ChunkedArray) -> pa.ChunkedArray | pa.Array:
    column = rows[name]
    if name == "user_id":
        return column
    if name == "user_key":
        marks = [tombstone(i) for i in rows["user_id"].to_pylist()]
        return pc.if_else(gone, pa.array(marks, column.type), column)
    # `take` gives null at a null index, for lists and vectors of fixed size as well.
    index = pc.if_else(gone, pa.scalar(None, pa.int64()), pa.array(np.arange(len(rows))))
    emptied = column.take(index)
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        return pc.fill_null(emptied, pa.scalar([], column.type))
    return emptied


def _codes(column: pa.Array) -> np.ndarray:
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        column = pc.list_flatten(column)
    return column.drop_null().to_numpy(zero_copy_only=False)


def _vocabularies(folder: Path, schema: Schema) -> Iterator[tuple[Feature, Path]]:
    """The features of users and of events whose values have a vocabulary in a folder, with its file."""
    for feature in (*schema.of("user", sparse=True), *schema.of("event", sparse=True)):
        file = folder / "vocab" / f"{feature.entity}_{feature.name}.parquet"
        if file.is_file():
            yield feature, file


def _copy_vocabularies(folder: Path, fresh: Path, schema: Schema, used: Mapping[str, np.ndarray]) -> None:
    if not (folder / "vocab").is_dir():
        return
    shutil.copytree(folder / "vocab", fresh / "vocab")
    for feature, file in _vocabularies(fresh, schema):
        if feature.name not in used or used[feature.name].all():
            continue
        table = pq.read_table(file).sort_by("code")
        values = table["value"].to_pylist()
        for code in np.flatnonzero(~used[feature.name][: len(values)])[::-1].tolist():
            values[code] = replacement(feature, code, values)
        position = table.column_names.index("value")
        pq.write_table(table.set_column(position, "value", pa.array(values, table["value"].type)), file)


def replacement(feature: Feature, code: int, values: Sequence[str]) -> str:
    """What takes the place of a value that nobody has any more, where later ones have been replaced already.

    A bucket becomes empty: it begins where the next one does, and its numbers fall into the one before. The first
    bucket begins at -inf, which says nothing of anybody.
    """
    if feature.kind != "quantile":
        return tombstone(code)
    if code == 0:
        return values[0]
    return values[code + 1] if code + 1 < len(values) else "inf"


def replaced_values(folder: Path) -> dict[str, dict[int, str]]:
    """By feature of users or events, what has taken the place of values that nobody has any more, by their codes."""
    found = {}
    for feature, file in _vocabularies(folder, Schema.load(folder / SCHEMA)):
        values = pq.read_table(file).sort_by("code")["value"].to_pylist()
        now = {code: value for code, value in enumerate(values) if value == replacement(feature, code, values)}
        found[feature.name] = {c: v for c, v in now.items() if feature.kind != "quantile" or c > 0}
    return found


def _without(report: dict[str, Any], keys: set[str], counts: Mapping[str, int], before: str) -> dict[str, Any]:
    """The report with how many users were forgotten, never who: an example that names one is removed."""
    named = re.compile("|".join(rf"(?<!\w){re.escape(key)}(?!\w)" for key in keys)) if keys else None
    for detail in report.get("dropped", {}).values():
        detail["examples"] = [e for e in detail.get("examples", ()) if not (named and named.search(str(e)))]
    earlier = report.get("forgotten", {})
    report["forgotten"] = {
        **{name: earlier.get(name, 0) + count for name, count in counts.items()},
        "fingerprints_before": [*earlier.get("fingerprints_before", ()), before],
    }
    return report
