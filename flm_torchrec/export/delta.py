"""Makes a delta of two exports, and applies a delta to the older one.

Rows of the same id are compared in all columns, bit by bit. Parts are compared one after another, so at most two are in
memory. The parts of a delta have the rows that are new or changed. `removed/items.parquet` and `removed/users.parquet`
have the keys that no longer exist, for stores that identify a row by its key.

With a tolerance, a row whose vectors have hardly moved stays the older one. It is compared with the row that was sent
last, so what is left out does not add up over deltas.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from pydantic.dataclasses import dataclass

from flm_torchrec.claim import claim
from flm_torchrec.errors import RunError
from flm_torchrec.evaluation.protocol import Collectives
from flm_torchrec.export.index import build_index
from flm_torchrec.export.manifest import (
    FILE,
    RECALL,
    STRICT,
    Count,
    IndexKind,
    Manifest,
    Sha256,
    check_files,
    check_manifest,
    is_part,
    load_manifest,
    read_manifest,
    read_strictly,
)
from flm_torchrec.export.parts import ENTITIES, Entity, ExportRows, part_name, read_part, write_part
from flm_torchrec.export.vectors import decode
from flm_torchrec.export.write import (
    ExportOptions,
    ExportSource,
    blank_manifest,
    check_output,
    claimed,
    export,
    fresh_folder,
    together,
)
from flm_torchrec.files import replacing, sha256, telling
from flm_torchrec.folders import DELTA

REMOVED = "removed"
JOIN_MEMORY = "1GB"
"""Memory of DuckDB for the search for removed keys; beyond it DuckDB uses the disk."""


@dataclass(frozen=True, config=STRICT)
class Delta:
    """`delta.json`, written last: what a delta changes. Field names are those of the file."""

    base_version: str
    """Model version of the export that the delta is applied to."""
    base_rows: str
    """`rows_digest` of that export."""
    changed: dict[str, Count]
    """Number of rows that are new or changed, of "items" and "users"."""
    removed: dict[str, Count]
    """Number of keys that no longer exist, of "items" and "users"."""
    whole: Manifest
    """Manifest of the resulting export, with the digests of its rows."""
    sha256: dict[str, Sha256]
    """Digests of the delta's own files."""

    def rows(self, folder: Path, entity: Entity) -> ExportRows:
        """The new and changed rows, in the delta's folder."""
        return ExportRows(folder, replace(self.whole, sha256=self.sha256), entity, complete=False)

    def removed_keys(self, folder: Path, entity: Entity) -> pa.ChunkedArray:
        """The keys that no longer exist.

        Raises:
            RunError: the file is missing, has another number of keys than the delta says, or has no texts.
        """
        name, key = f"{REMOVED}/{entity}.parquet", f"{entity[:-1]}_key"
        if name not in self.sha256:
            raise RunError(f"{folder / name}: not found; export again")
        keys = read_part(folder / name, [key])[key]
        if keys.type != pa.string() or keys.null_count or len(keys) != self.removed.get(entity):
            raise RunError(f"{folder / name}: holds {len(keys)} of {keys.type}, not the keys told; export again")
        return keys


def check_alike(folder: Path, old: Manifest, new: Manifest) -> None:
    """Raise RunError where the rows of two exports cannot be compared."""
    for name in ("data", "dim", "heads", "storage", "quantise", "part_rows"):
        was, is_ = getattr(old, name), getattr(new, name)
        if was != is_:
            raise RunError(f"{folder}: {name} is {was} there and {is_} here; export whole, without --since")


def write_delta(base: Path, old: Manifest, complete: Path, new: Manifest, output: Path) -> Delta:
    """Compare two exports, and write the delta that leads from `base` to `complete`. The caller has locked the output.

    Raises:
        RunError: their rows cannot be compared.
    """
    check_alike(base, old, new)
    with telling(output), replacing(output) as fresh:
        changed: dict[str, int] = {
            e: _write_changed(ExportRows(base, old, e), ExportRows(complete, new, e), complete, fresh) for e in ENTITIES
        }
        removed: dict[str, int] = {
            e: _write_removed(ExportRows(base, old, e), ExportRows(complete, new, e), e, fresh) for e in ENTITIES
        }
        for name in new.sha256:
            if not is_part(name):  # files beside the rows are copied
                _copy(name, complete, fresh)
        files = {f.relative_to(fresh).as_posix(): sha256(f) for f in sorted(fresh.rglob("*")) if f.is_file()}
        delta = Delta(old.model_version, old.rows_digest, changed, removed, new, files)
        (fresh / DELTA).write_text(json.dumps(asdict(delta), indent=2), encoding="utf-8")
    return delta


def load_delta(folder: Path) -> Delta:
    """Read `delta.json` and check that every file exists and is unchanged.

    Raises:
        RunError: there is no delta, it has another format, or a file is missing or changed.
    """
    file = folder / DELTA
    if not file.is_file():
        raise RunError(f"{file}: not found; make a delta with 'flm export --since OLDER --output {folder}'")
    delta = read_strictly(file, Delta)
    check_manifest(delta.whole, file)
    if set(delta.changed) != set(ENTITIES) or set(delta.removed) != set(ENTITIES):
        raise RunError(f"{file}: changed and removed: want {' and '.join(ENTITIES)}; export again")
    check_files(folder, delta.sha256, file)
    return delta


def apply_delta(base: Path, folder: Path, output: Path, overwrite: bool = True) -> Manifest:
    """Write the resulting export: its rows bit for bit, and an index of the kind that the base has.

    Args:
        overwrite: replace an older export at `output`; without it that is refused. Anything else is never replaced.

    Raises:
        RunError: the delta has another base, one of the two is incomplete, or another process writes the output.
    """
    with claim(output):
        check_output(output, overwrite)
        return _apply_delta(base, folder, output)


def _apply_delta(base: Path, folder: Path, output: Path) -> Manifest:
    old, delta = load_manifest(base), load_delta(folder)
    if old.rows_digest != delta.base_rows:
        raise RunError(
            f"{folder}: changes an export of model {delta.base_version}, and {base} is another one"
            f" (of {old.model_version}); apply deltas in the order they were made"
        )
    check_alike(base, old, delta.whole)
    kind: IndexKind = "none"
    if old.index:  # the kind that was set: with the new rows it may reach the promised recall
        kind = old.index.asked if old.index.rows else old.index.kind
    promised = old.index.promised if old.index else RECALL
    with telling(output), replacing(output) as fresh:
        for entity in ENTITIES:
            _write_merged(ExportRows(base, old, entity), delta.rows(folder, entity), entity, delta, fresh)
        for name in delta.sha256:
            if not is_part(name) and not name.startswith(f"{REMOVED}/"):
                _copy(name, folder, fresh)
        manifest = replace(delta.whole, sha256={}).listing(fresh)
        if manifest.rows_digest != delta.whole.rows_digest:
            raise RunError(f"{output}: is not what the delta was made of; apply it with the same version of pyarrow")
        manifest = replace(manifest, index=build_index(fresh, manifest, kind, promised)).listing(fresh)
        manifest.save(fresh)
    return manifest


def export_delta(
    source: ExportSource, comm: Collectives, base: Path, output: Path, options: ExportOptions, overwrite: bool = True
) -> Delta | None:
    """Make a complete export in a temporary folder beside `output`, and write its delta to `base`; collective.

    Raises:
        RunError: as of `export` and `write_delta`. Rows that cannot be compared are refused before any is encoded.
    """
    old = read_manifest(base)
    options = replace(options, index="none", part_rows=old.part_rows)
    check_alike(base, old, blank_manifest(source, options))
    together(comm, base, lambda: check_files(base, old.sha256, base / FILE) if comm.rank == 0 else None)
    with claimed(output, overwrite, comm), fresh_folder(output, comm) as beside:
        complete = beside / "complete"
        manifest = export(source, comm, complete, options)
        if manifest is None:
            return None
        if options.tolerance:
            manifest = _keep_close(base, old, complete, manifest, options.tolerance)
        return write_delta(base, old, complete, manifest, output)


def _keep_close(base: Path, old: Manifest, complete: Path, new: Manifest, tolerance: float) -> Manifest:
    """Put the older row in place of each row that is the same but for vectors within the tolerance."""
    files = {name: digest for name, digest in new.sha256.items() if not is_part(name)}
    for entity in ENTITIES:
        rows = ExportRows(complete, new, entity)
        before = {file.name: file for file in ExportRows(base, old, entity).files}
        for file in rows.files:
            if file.name not in before:
                continue
            table, older = rows.part(file), ExportRows(base, old, entity).part(before[file.name])
            close = ~_differs(older, table, before[file.name], tolerance)
            source_row = np.arange(len(older), len(older) + len(table))
            source_row[close] = np.flatnonzero(close)
            both = pa.concat_tables([older.replace_schema_metadata(), table.replace_schema_metadata()])
            write_part(file, both.take(source_row).replace_schema_metadata(table.schema.metadata))
    return replace(new, sha256=files, tolerance=tolerance).listing(complete)


def _copy(name: str, source: Path, target: Path) -> None:
    (target / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source / name, target / name)


def _write_changed(old: ExportRows, new: ExportRows, complete: Path, fresh: Path) -> int:
    count = 0
    before = {file.name: file for file in old.files}
    for file in new.files:
        table = new.part(file)
        changed = np.ones(len(table), bool)
        if file.name in before:
            changed = _differs(old.part(before[file.name]), table, before[file.name])
        if changed.any():
            write_part(fresh / file.relative_to(complete), table.filter(pa.array(changed)))
            count += int(changed.sum())
    return count


def _differs(old: pa.Table, new: pa.Table, file: Path, tolerance: float = 0.0) -> np.ndarray:
    """[rows of new] bool: the row differs from the old row at its position, or there is none.

    Args:
        tolerance: vectors of which none has moved by more than this part of its length count as equal; 0: bit by bit.
    """
    if not old.schema.equals(new.schema):
        raise RunError(f"{file}: has other columns than the new export; export whole, without --since")
    both = min(len(old), len(new))
    changed = np.zeros(len(new), bool)
    changed[both:] = True
    for name in new.column_names:
        a, b = old[name].slice(0, both).combine_chunks(), new[name].slice(0, both).combine_chunks()
        if pa.types.is_fixed_size_list(a.type) and tolerance:
            changed[:both] |= _apart(decode(a), decode(b), tolerance)
        elif pa.types.is_fixed_size_list(a.type):
            bits = [column.flatten().to_numpy().view(np.uint8).reshape(both, -1) for column in (a, b)]
            changed[:both] |= (bits[0] != bits[1]).any(1)
        else:
            changed[:both] |= pl.Series(a).ne_missing(pl.Series(b)).to_numpy()
    return changed


def _apart(old: np.ndarray, new: np.ndarray, tolerance: float) -> np.ndarray:
    """[n, D] twice → [n] bool: the distance is more than this part of the length of the new vector."""
    return np.linalg.norm(new - old, axis=1) > tolerance * np.linalg.norm(new, axis=1)


def _write_removed(old: ExportRows, new: ExportRows, entity: Entity, fresh: Path) -> int:
    """Write the keys of old rows that no new row has, and return their number."""
    key, file = f"{entity[:-1]}_key", fresh / REMOVED / f"{entity}.parquet"
    file.parent.mkdir(exist_ok=True)
    spill = fresh / "spill"
    with duckdb.connect(config={"memory_limit": JOIN_MEMORY, "temp_directory": str(spill)}) as connection:
        for name, rows in (("before", old), ("after", new)):
            connection.register(name, ds.dataset(rows.files, format=rows.storage).scanner([key]))
        gone = f"SELECT {key} FROM before ANTI JOIN after USING ({key}) ORDER BY {key}"
        connection.sql(gone).write_parquet(str(file))
    shutil.rmtree(spill, ignore_errors=True)
    return pq.read_metadata(file).num_rows


def _write_merged(old: ExportRows, new: ExportRows, entity: Entity, delta: Delta, fresh: Path) -> None:
    rows = new.count
    version = {"model_version": delta.whole.model_version, "format": str(delta.whole.format)}
    before, after = ({file.name: file for file in side.files} for side in (old, new))
    for part, start in enumerate(range(0, rows, delta.whole.part_rows)):
        name = part_name(entity, delta.whole.storage, part)
        stop, file = min(start + delta.whole.part_rows, rows), Path(name).name
        tables = [old.part(before[file])] if file in before else []
        kept = len(tables[0]) if tables else 0
        source_row = np.arange(stop - start)
        if file in after:
            changed = new.part(after[file])
            source_row[changed[f"{entity[:-1]}_id"].to_numpy() - start] = kept + np.arange(len(changed))
            tables.append(changed)
        if not tables or source_row.max() >= sum(map(len, tables)) or any(t.schema != tables[0].schema for t in tables):
            raise RunError(f"{fresh.name}: {name} does not follow from base and delta; export whole")
        write_part(fresh / name, pa.concat_tables(tables).take(source_row).replace_schema_metadata(version))
