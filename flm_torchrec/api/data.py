"""A table, a file or a built-in source → prepared data."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flm_torchrec.config.options import option_names, options_of
from flm_torchrec.errors import ConfigError, DataError
from flm_torchrec.names import nearest
from flm_torchrec.prepare.options import LogOptions, MachineOptions, PrepareOptions, Recipe

if TYPE_CHECKING:
    import pyarrow as pa

    from flm_torchrec.data.schema import Entity
    from flm_torchrec.frames import Frame
    from flm_torchrec.prepare.sources.source_data import SourceData

SYNTHETIC = "synthetic-"
"""Before the name of each option of the synthetic source."""


@dataclass(frozen=True)
class Prepared:
    """A folder of prepared data, which `train` takes."""

    path: Path
    report: dict[str, Any] = field(repr=False)
    """The contents of report.json: what was read, kept and dropped."""

    def __fspath__(self) -> str:
        """The path as text, so that `open` and `Path` take the folder."""
        return str(self.path)


@dataclass(frozen=True)
class Input:
    """What a source reads."""

    source: str
    location: str | None
    name: str
    """Of the data, where the source has none."""
    given: Mapping[str, Any]
    """Options by name."""
    events: pa.Table | None
    described: Mapping[Entity, pa.Table]
    """Tables of items and users that are in memory."""


def prepare(
    events: Frame | str | os.PathLike[str] | None,
    output: str | os.PathLike[str],
    *,
    items: Frame | str | os.PathLike[str] | None = None,
    users: Frame | str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    **options: Any,
) -> Prepared:
    """Clean events, code ids and features, and write prepared data; the folder appears complete or not at all.

    Args:
        events: a table of pandas, polars or Arrow, or a path or an address of Parquet, CSV or JSON lines, or of a Delta
            or Iceberg table. None for a source that reads nothing.
        output: folder to write.
        items: what describes items: a table or a path. Name its features with `item_features`.
        users: the same of users, with `user_features`.
        overwrite: replace older prepared data; anything else at the output is never replaced.
        options: those of `flm prepare`, with underscores: `columns={"user": "uid", "item": "sku"}`,
            `item_features={"brand": "categorical"}`, `dedup="exact"`, `k_core=5`, `source="movielens-100k"`, …

    Raises:
        FlmError: an option, a table or the output is wrong. Nothing is written then.

    Example:
        >>> import polars as pl
        >>> import flm_torchrec as flm
        >>> rows = [(f"u{u}", f"i{(u * 7 + n * n) % 30}", 3600 * n) for u in range(40) for n in range(8)]
        >>> events = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
        >>> items = pl.DataFrame({"item_id": [f"i{i}" for i in range(30)], "brand": [f"b{i % 3}" for i in range(30)]})
        >>> data = flm.prepare(events, "data/shop", items=items, item_features={"brand": "categorical"})
        >>> data.report["users"], data.report["items"], data.report["rows_kept"]
        (40, 30, 320)
    """
    from flm_torchrec.files import path_of
    from flm_torchrec.frames import arrow_of, is_frame

    folder = path_of(output, "output")
    given = {name: value for name, value in options.items() if value is not None}
    described: dict[Entity, pa.Table] = {}
    entities: tuple[tuple[Entity, Any], ...] = (("item", items), ("user", users))
    for name, value in entities:
        if is_frame(value):
            described[name] = arrow_of(value, f"{name}s")
            given[f"{name}s"] = f"{name}s"  # stands for the path, in errors
        elif value is not None:
            given[f"{name}s"] = _path(value, f"{name}s")
    table = arrow_of(events, "events") if is_frame(events) else None
    location = None if events is None or table is not None else _path(events, "events")
    found = "table" if table is not None else "" if location is None else _format(location)
    source = str(given.pop("source", found))
    return _prepared(Input(source, location, folder.name, given, table, described), folder, overwrite)


def _prepared(wanted: Input, output: Path, overwrite: bool) -> Prepared:
    given = dict(wanted.given)
    _refuse_unknown(given)
    hash_users = given.pop("hash_users", None)
    if wanted.source not in SOURCES:
        raise DataError(f"--source '{wanted.source}' is not known; {nearest(wanted.source, SOURCES)}")
    options, machine = options_of(PrepareOptions, given), options_of(MachineOptions, given)
    _check_location(wanted)
    # Imported here: a wrong option should be reported at once.
    from flm_torchrec.prepare.hash_users import read_secret
    from flm_torchrec.prepare.prepare import check_output
    from flm_torchrec.prepare.prepare import prepare as write_prepared

    check_output(output, overwrite)
    secret = read_secret(Path(hash_users)) if hash_users else b""
    report = write_prepared(SOURCES[wanted.source](wanted), output, options, overwrite, machine, secret)
    return Prepared(output, report)


def _refuse_unknown(given: Mapping[str, Any]) -> None:
    known = ["source", "hash_users"]
    for kind, prefix in ((PrepareOptions, ""), (LogOptions, ""), (MachineOptions, ""), (Recipe, SYNTHETIC)):
        known += option_names(kind, prefix)
    for name in given:
        if name not in known:
            raise ConfigError(f"prepare: no option '{name}'; {nearest(name, known)}")


def _path(value: Any, name: str) -> str:
    from flm_torchrec.frames import no_table

    if not isinstance(value, str | os.PathLike):
        raise no_table(value, name)
    return str(value)


def _format(location: str) -> str:
    from flm_torchrec.prepare.sources.entity_tables import source_of

    return source_of(location)


def _check_location(wanted: Input) -> None:
    source, path = wanted.source, wanted.location
    if wanted.given.get("table_version") is not None and source not in ("delta", "iceberg"):
        raise DataError(f"--table-version: only delta and iceberg have versions, not '{source}'; leave it out")
    if source in ("synthetic", "table"):
        if path is not None or (source == "table") != (wanted.events is not None):
            reads = "nothing" if source == "synthetic" else "a table in memory"
            raise DataError(f"--input {path}: the source '{source}' reads {reads}; name yours with --source")
        return
    if path is None:
        raise DataError(f"--input: name the folder or file of the source '{source}'")
    if "://" not in path and not Path(path).exists() and path == glob.escape(path):
        raise DataError(f"{path}: not found; --input must name the folder or file of the source")


def _synthetic(wanted: Input) -> SourceData:
    from flm_torchrec.prepare.sources import synthetic

    return synthetic.read(options_of(Recipe, wanted.given, SYNTHETIC))


def _movielens(wanted: Input) -> SourceData:
    from flm_torchrec.prepare.sources import movielens

    return movielens.read(Path(wanted.location or ""))


def _s3rec(wanted: Input) -> SourceData:
    from flm_torchrec.prepare.sources import s3rec

    return s3rec.read(Path(wanted.location or ""))


def _logs(wanted: Input) -> SourceData:
    from flm_torchrec.prepare.sources import logs

    return logs.read(wanted.source, wanted.location or "", options_of(LogOptions, wanted.given), wanted.described)


def _table(wanted: Input) -> SourceData:
    from flm_torchrec.prepare.sources import logs

    options = options_of(LogOptions, wanted.given)
    return logs.read_table_of_events(wanted.name, wanted.events, options, wanted.described)


SOURCES: dict[str, Callable[[Input], SourceData]] = {
    "synthetic": _synthetic,
    "movielens-100k": _movielens,
    "amazon-s3rec": _s3rec,
    "parquet": _logs,
    "csv": _logs,
    "jsonl": _logs,
    "delta": _logs,
    "iceberg": _logs,
    "table": _table,
}
"""What reads a source."""
