"""Files of logs and tables, local or at any address that fsspec knows: which are meant, and how to open one."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from flm_torchrec.errors import DataError
from flm_torchrec.prepare.sources import packed
from flm_torchrec.safe_text import first_line, redact_address

ENDINGS = {"parquet": (".parquet",), "csv": (".csv",), "jsonl": (".jsonl", ".ndjson")}
"""In small letters; text may be packed, with the ending of that behind it."""
LAKEHOUSES = ("delta", "iceberg")
"""Kinds of tables whose log or metadata say which of their files count."""
METADATA = ".metadata.json"
"""Ending of Iceberg's metadata files."""
HIDDEN = (".", "_")
"""Begin the names of what tools write beside data, such as _SUCCESS."""
SHOWN = 5
"""Entries of a folder that a line lists."""


@dataclass(frozen=True)
class InputFile:
    """Where a file of logs is."""

    url: str
    """Path, or address for fsspec."""
    name: str
    """End of the path, from the folder on that all files are in; the report names the file by it."""
    identity: str
    """Differs once the contents do."""

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """The bytes, unpacked if the ending of the name says so.

        Raises:
            DataError: an archive of several files.
            One of packed.ERRORS: cut off, not packed as its name says, or out of reach; also while reading.
        """
        # A path is one, whatever fsspec would make of its characters.
        file = fsspec.open(self.url, "rb") if "://" in self.url else LocalFileSystem().open(self.url, "rb")
        with file as stream, packed.unpacked(stream, self.url) as contents:
            yield contents

    @contextmanager
    def text(self) -> Iterator[IO[bytes]]:
        """As `open`, for text.

        Raises:
            DataError: cut off, not packed as its name says, an archive of several files, or out of reach.
        """
        try:
            with self.open() as stream:
                yield stream
        except packed.ERRORS as error:
            raise DataError(f"{self.url}: cannot be read to its end ({first_line(error)}); write it again") from error


def kind_of(name: str) -> str | None:
    """The source of ENDINGS that a file is of by its name; None: none of them."""
    plain = packed.plain_name(name)
    kinds = [source for source, endings in ENDINGS.items() if plain.endswith(endings)]
    return kinds[0] if kinds and (plain == name.lower() or kinds[0] != "parquet") else None


def find_files(source: str, location: str, note: Callable[[str], None], option: str = "--input") -> list[InputFile]:
    """A file, all files of a folder with an ending of the source, or all that a pattern matches, by name.

    Args:
        note: takes a line where a folder has something else too.

    Raises:
        DataError: none is there, one is empty, or the address cannot be reached.
    """
    shown = redact_address(location)
    try:
        system, path = system_of(location)
        paths, others = _listed(system, path, source)
        if paths != [path]:
            _refuse_lakehouse(system, path, paths, location)
        stated = [(name, system.info(name)) for name in paths]
    except (OSError, ImportError, ValueError) as error:
        raise DataError(f"{shown}: cannot be reached ({first_line(error, location)}); check the address") from error
    kinds = " or ".join(f"*{ending}" for ending in ENDINGS[source])
    if not paths:
        what = f"no file {kinds}{_but(others)}" if system.isdir(path) else "not found"
        raise DataError(f"{shown}: {what}; {option} must be a file {kinds}, a folder of them or a pattern")
    if others:
        folders = any(other.endswith("/") for other in others)
        deeper = f"; {option} '{shown.rstrip('/')}/**/*{ENDINGS[source][0]}' reads the folders inside it too"
        note(f"{shown}: its files {kinds} are read{_but(others)}{deeper if folders else ''}")
    files = []
    for (name, info), short in zip(stated, short_names(paths), strict=True):
        url = system.unstrip_protocol(name) if "://" in location else name
        if info.get("size") == 0:
            raise DataError(f"{url}: is empty; give a file with data")
        changed = info.get("mtime") or info.get("LastModified") or info.get("updated") or info.get("ETag")
        files.append(InputFile(url, short, f"{url} {info.get('size')} {changed}"))
    return files


def short_names(paths: Sequence[str]) -> list[str]:
    """The paths from the folder on that all of them are in, without secrets."""
    folder = os.path.commonpath([PurePosixPath(path).parent for path in paths])
    return [redact_address(str(PurePosixPath(path).relative_to(folder))) for path in paths]


def _but(others: Sequence[str]) -> str:
    """Says which entries of a folder are not read."""
    more = f" and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
    return f", not {', '.join(others[:SHOWN])}{more}" if others else ""


def system_of(location: str) -> tuple[Any, str]:
    """The file system of a path or an address, and the path in it.

    Raises:
        OSError, ImportError, ValueError: out of reach, or what fsspec needs for it is not installed.
    """
    if "://" in location:
        return fsspec.core.url_to_fs(location)
    return LocalFileSystem(), str(Path(location).absolute())


def lakehouse_of(system: Any, folder: str) -> str | None:
    """Which of LAKEHOUSES a folder is; None: neither."""
    if system.isdir(f"{folder}/_delta_log"):
        return "delta"
    return "iceberg" if metadata_files(system, folder) else None


def metadata_files(system: Any, folder: str) -> list[str]:
    """Names of the metadata files of an Iceberg table; none where a folder is no such table."""
    if not system.isdir(f"{folder}/metadata"):
        return []
    names = [PurePosixPath(path).name for path in system.ls(f"{folder}/metadata", detail=False)]
    return [name for name in names if name.endswith(METADATA)]


def _refuse_lakehouse(system: Any, path: str, found: list[str], location: str) -> None:
    folders = {path} if system.isdir(path) else {str(PurePosixPath(name).parent) for name in found}
    for place in sorted({place for folder in folders for place in _tables_around(folder)}):
        if kind := lakehouse_of(system, place):
            shown = redact_address(location)
            raise DataError(f"{shown}: is of a {kind} table, some of whose files do not count; give --source {kind}")


def _tables_around(folder: str) -> Iterator[str]:
    """The folder, and those above it while it may be a partition or the data folder of a table."""
    yield folder
    place = PurePosixPath(folder)
    while "=" in place.name or place.name == "data":
        place = place.parent
        yield str(place)


def _listed(system: Any, path: str, source: str) -> tuple[list[str], list[str]]:
    """The files that are meant; and of a folder the names of its other entries, but for hidden ones."""
    if system.isfile(path):
        return [path], []
    if not system.isdir(path):
        return sorted(name for name in system.glob(_pattern(system, path)) if system.isfile(name)), []
    paths, others = [], []
    for entry in sorted(system.ls(path, detail=True), key=lambda entry: entry["name"]):
        name = PurePosixPath(entry["name"]).name
        folder = entry["type"] == "directory"
        if kind_of(name) == source and not folder:
            paths.append(entry["name"])
        elif not name.startswith(HIDDEN):
            others.append(f"{name}/" if folder else name)
    return paths, others


def _pattern(system: Any, path: str) -> str:
    """The path as a pattern, in which a folder that exists under exactly that name stands for itself."""
    folder = PurePosixPath(path).parent
    while glob.escape(str(folder)) != str(folder) and not system.isdir(str(folder)):
        folder = folder.parent
    return glob.escape(str(folder)) + path.removeprefix(str(folder)) if str(folder) != "." else path
