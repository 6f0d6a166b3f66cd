"""Removing users from an export: their rows stay, empty, so that no id shifts. Rows of all others stay bit for bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from flm_torchrec.data.feature_values import FeatureValues
from flm_torchrec.data.keys import tombstone
from flm_torchrec.documents import MOST_JSON_BYTES, read_text
from flm_torchrec.errors import RunError
from flm_torchrec.export.manifest import Manifest, load_manifest
from flm_torchrec.export.parts import ExportRows, write_part
from flm_torchrec.export.tower.layout import DESCRIPTION, FOLDER, HISTORIES, ONNX, PROFILE, USER
from flm_torchrec.export.vectors import encode
from flm_torchrec.files import leftovers, replacing, sha256, telling

USER_TABLES = ("tables.user_id.", "tables.profile.")
"""Beginnings of the names of the tensors of `UserProgram` that have a row for each user."""


class ValueRows(NamedTuple):
    """Where a program has rows for the values of features."""

    entity: str
    """Of which features are."""
    file: str
    table: str
    """Beginning of the names of the table's tensors."""
    starts: str
    """Name of the tensor that says where each feature's rows begin."""
    before: int
    """Rows of a feature before that of its first value."""


VALUE_ROWS = (
    ValueRows("user", PROFILE, "table.", "offset", 0),
    ValueRows("event", USER, "tables.context.", "first", 1),
)
BLOCK = 16_384
"""Rows of a row group of histories, as they are first written."""
AGAIN = "give the same command again"
AFTERWARDS = f"{AGAIN} afterwards"


def forget_in_export(folder: Path, keys: Collection[str], values: Mapping[str, Mapping[int, str]]) -> int:
    """Rewrite an export without these users, and replace the folder by the new one; the number of users found.

    Of a user a row without events stays, with a tombstone for a key and zeros for vectors. Rows of the tower's tables
    become zero too. Without such users nothing is written. Claim the folder first.

    Args:
        values: by feature of users or events, what takes the place of values that nobody has any more, by their codes.

    Raises:
        RunError: the export is damaged, or it cannot be written; the old one stays.
    """
    manifest = load_manifest(folder)
    rows = np.array([user for user, _ in users_with(folder, manifest, keys)], np.int64)
    if len(rows) == 0:
        return 0
    with telling(folder, AFTERWARDS), replacing(folder) as fresh:
        shutil.copytree(folder, fresh, dirs_exist_ok=True)
        changed = _rewrite_users(folder, fresh, manifest, rows)
        if (folder / FOLDER).is_dir():
            changed |= _rewrite_tower(fresh / FOLDER, rows, values)
        digests = manifest.sha256 | {name: sha256(fresh / name) for name in changed}
        cleaned = (*manifest.cleaned_of, manifest.rows_digest)
        replace(manifest, sha256=digests, cleaned_of=cleaned).save(fresh)
    refuse_leftovers(leftovers(folder.resolve().parent, folder.resolve().name))
    return len(rows)


def refuse_leftovers(left: Sequence[Path]) -> None:
    """Raise RunError where an old folder could not be removed: it still has the users."""
    if left:
        raise RunError(f"{left[0]}: was replaced and cannot be removed; remove it, then {AGAIN}")


def users_with(folder: Path, manifest: Manifest, keys: Collection[str]) -> list[tuple[int, str]]:
    """Ids and keys of the users of an export who have one of the keys.

    Raises:
        RunError: the rows cannot be read.
    """
    wanted = pa.array(sorted(keys), pa.string())
    found = []
    for part in ExportRows(folder, manifest, "users").parts(["user_id", "user_key"]):
        there = part.filter(pc.is_in(part["user_key"], wanted))
        found += list(zip(there["user_id"].to_pylist(), there["user_key"].to_pylist(), strict=True))
    return found


def _rewrite_users(folder: Path, fresh: Path, manifest: Manifest, users: np.ndarray) -> set[str]:
    """Empty the users' rows in the part files → names of the files that changed."""
    changed = set()
    source = ExportRows(folder, manifest, "users")
    for file in source.files:
        table = source.part(file)
        there = np.flatnonzero(np.isin(table["user_id"].to_numpy(), users))
        if len(there) == 0:
            continue
        ids = table["user_id"].to_numpy()[there]
        zeros = encode(np.zeros((len(ids), manifest.dim), np.float32), manifest.quantise)
        blank = {"user_id": ids, "user_key": [tombstone(i) for i in ids.tolist()], "seen": [[]] * len(ids)}
        columns = [pa.array(blank[name]) if name in blank else zeros for name in table.column_names]
        empty = pa.table(columns, names=table.column_names).cast(table.schema)
        name = file.relative_to(folder).as_posix()
        write_part(fresh / name, _exchanged(table, there, empty))
        changed.add(name)
    return changed


def _exchanged(table: pa.Table, rows: np.ndarray, instead: pa.Table) -> pa.Table:
    """The table with other rows in place of `rows` [n]."""
    index = np.arange(len(table))
    index[rows] = len(table) + np.arange(len(rows))
    return pa.concat_tables([table, instead]).take(index).replace_schema_metadata(table.schema.metadata)


def _rewrite_tower(tower: Path, users: np.ndarray, values: Mapping[str, Mapping[int, str]]) -> set[str]:
    """Empty the users' histories and rows, and rows and names of values that nobody has → the files that changed."""
    histories = pq.read_table(tower / HISTORIES)
    none = pa.table({f.name: [[]] * len(users) for f in histories.schema}, schema=histories.schema)
    pq.write_table(_exchanged(histories, users, none), tower / HISTORIES, row_group_size=BLOCK)
    _reset(tower / USER, USER_TABLES, users)
    changed = {HISTORIES, USER}
    description = json.loads(read_text(tower / DESCRIPTION, MOST_JSON_BYTES))
    for value_rows in VALUE_ROWS:
        of_entity = [f for f in description["features"] if f["entity"] == value_rows.entity]
        coded = [f for f in of_entity if not FeatureValues.described(f).dense]
        gone = [_forget_values(feature, values.get(feature["name"], {})) for feature in coded]
        if any(gone):
            first = torch.export.load(tower / value_rows.file).state_dict[value_rows.starts].tolist()
            rows = [start + value_rows.before + c for start, codes in zip(first, gone, strict=True) for c in codes]
            _reset(tower / value_rows.file, (value_rows.table,), np.array(rows))
            changed |= {value_rows.file, DESCRIPTION}
    if DESCRIPTION in changed:
        (tower / DESCRIPTION).write_text(json.dumps(description), encoding="utf-8")
    if (tower / ONNX).is_file():
        from flm_torchrec.export.tower.onnx import write_onnx  # imports the model

        changed |= set(write_onnx(tower))
    return {f"{FOLDER}/{name}" for name in changed}


def _forget_values(feature: dict[str, Any], instead: Mapping[int, str]) -> list[int]:
    """Exchange values of a described feature in place → the codes of those that were still there."""
    there = [c for c in instead if c < len(feature.get("values", ())) and feature["values"][c] != instead[c]]
    for code in there:
        feature["values"][code] = instead[code]
    return there


def _reset(file: Path, tables: tuple[str, ...], rows: np.ndarray) -> None:
    """Set rows of a program's tables to zero, given by the beginnings of their tensors' names."""
    program = torch.export.load(file)
    tensors = [t for name, t in program.state_dict.items() if name.startswith(tables)]
    if len(tensors) < len(tables):
        raise RunError(f"{file}: has no tables {', '.join(tables)}; export again")
    for tensor in tensors:
        tensor[torch.from_numpy(rows)] = 0
    torch.export.save(program, file)
