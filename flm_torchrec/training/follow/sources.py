"""Where new events come from: a folder that files are put into, or a Kafka topic."""

from __future__ import annotations

import json
import stat
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from flm_torchrec.data.event_files import as_data_error
from flm_torchrec.data.keys import as_text, frame_of
from flm_torchrec.errors import DataError
from flm_torchrec.safe_text import first_line, redact_address
from flm_torchrec.training.follow.folder import Ledger, Taken, taken_whole

PARQUET_MARK = b"PAR1"
SMALLEST_PARQUET = 12
"""Bytes: a file begins and ends with the mark, and has the length of its footer before the end."""
SUFFIXES = (".parquet", ".jsonl")
REMEMBERED = 10_000
"""Files whose content is still known after they left the folder, in case it comes again."""


@dataclass(frozen=True)
class BadRow:
    """What stands for a row that cannot be read, with the reason."""

    reason: str = "not a JSON object"


@dataclass(frozen=True)
class Chunk:
    """Rows that are learned from together."""

    name: str
    rows: list[tuple[str, Any]]
    """Where each row stands, for the report, and what it holds; None or a `BadRow` where that cannot be read."""
    position: dict[str, Any]
    """Position of the source after these rows; `EventSource.after` takes it and gives the rows behind them."""


class EventSource(Protocol):
    """A source gives the same rows after the same position, if it still has them."""

    messages: list[str]
    """Lines for the user; whoever shows them clears the list."""

    def resume(self, position: dict[str, Any]) -> dict[str, Any]:
        """The position of an earlier run, or {} → a position that `after` takes.

        Raises:
            DataError: the position is that of another source.
        """

    def after(self, position: dict[str, Any]) -> Chunk | None:
        """The next chunk; None if there is nothing new at the moment.

        Raises:
            DataError: the source cannot be read.
        """


def open_source(url: str, avro_schema: str = "") -> EventSource:
    """The source that `url` names: a folder, or kafka://HOST:PORT/TOPIC.

    Args:
        avro_schema: files of the schemas of a topic's messages, as of `AvroMessages.of`; empty: they are JSON.

    Raises:
        DataError: there is none, or what it needs is not installed.
    """
    shown = redact_address(url)
    try:
        parts = urlsplit(url)
    except ValueError as error:
        reason = first_line(error, url)
        raise DataError(f"--source {shown}: no address ({reason}); write it as kafka://HOST:PORT/TOPIC") from error
    if parts.scheme == "kafka":
        if "@" in url or parts.query or parts.fragment:
            raise DataError(f"--source {shown}: takes no user, password or settings; write it kafka://HOST:PORT/TOPIC")
        if not parts.netloc or not parts.path.strip("/"):
            raise DataError(f"--source {shown}: write it as kafka://HOST:PORT/TOPIC")
        # Imported here, because they need the classes of this file.
        from flm_torchrec.training.follow.avro import AvroMessages
        from flm_torchrec.training.follow.kafka import KafkaTopic

        avro = AvroMessages.of(avro_schema) if avro_schema else None
        return KafkaTopic(parts.netloc, parts.path.strip("/"), avro)
    if avro_schema:
        raise DataError(f"--avro-schema: only messages of Kafka are Avro, and --source is {shown}; leave one out")
    if parts.scheme:
        raise DataError(f"--source {shown}: '{parts.scheme}' is not known; give a folder or kafka://HOST:PORT/TOPIC")
    if not Path(url).is_dir():
        raise DataError(f"--source {shown}: no such folder; make it, or give kafka://HOST:PORT/TOPIC")
    return Folder(Path(url))


class Folder:
    """Files in order of their names, and of each file the rows that are new; `Ledger` says which these are.

    A Parquet file is complete once its footer is there. A JSONL file is read up to its last line break, and may grow.
    Hidden files are not read; nor are files with other endings and what is no file, which is told.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.messages: list[str] = []
        self.reported: set[str] = set()
        self.idle: dict[str, tuple[int, int, Taken | None]] = {}
        """By name: size, time and entry of a file in which nothing was new, so that it is not read again each time."""

    def resume(self, position: dict[str, Any]) -> dict[str, Any]:
        """As of `EventSource`. A folder that was moved is recognised by its files."""
        files = position.get("files", {})
        if position and "files" not in position:
            raise other_source("a Kafka topic", f"folder {self.path}")
        if isinstance(files, list):
            files = self._adopt(files)
        began = Path(position.get("folder", self.path))
        try:
            if not began.samefile(self.path):
                raise other_source(f"folder {began}", f"folder {self.path}")
        except OSError:
            self._report(f"{began}: is not there any more, so {self.path} is taken for it; files are known by content")
        return {"folder": str(self.path.resolve()), "files": files}

    def after(self, position: dict[str, Any]) -> Chunk | None:
        """As of `EventSource`: the new rows of the first file that has any."""
        ledger = Ledger(position.get("files", {}))
        before = dict(ledger.files)
        files = self._files()
        there = {file.name for file in files}
        rows: list[tuple[str, Any]] = []
        name = ""
        for file in files:
            rows = self._new_rows(file, ledger, there - {file.name})
            name = file.name
            if rows:
                break
        if not rows and ledger.files == before:
            return None
        ledger.forget_gone(there, REMEMBERED)
        return Chunk(name, rows, {"folder": str(self.path.resolve()), "files": ledger.to_json()})

    def _new_rows(self, file: Path, ledger: Ledger, there: set[str]) -> list[tuple[str, Any]]:
        """Rows of the file that were not taken before; they are entered into the ledger."""
        old = ledger.files.get(file.name)
        status = self._status(file)
        if status is None or (old and (old.size, old.modified) == status) or self.idle.get(file.name) == (*status, old):
            return []
        content = self._complete(file)
        if content is None or (old is None and not content):
            return []
        if old is None and file.suffix == ".jsonl" and self._arriving(file, content, status[0], ledger):
            self.idle[file.name] = (*status, old)
            return []
        begins = ledger.begins_with(content, there)
        if file.suffix == ".parquet" and begins and begins[1].size < len(content):
            begins = None  # a Parquet file does not grow
        if old and (begins is None or begins[1].size < old.size):
            raise DataError(
                f"{file}: is not what it was when its rows were learnt from; put that content back, or take the file"
                " away, and put new rows at its end or into a new file"
            )
        if begins and begins[1].size == len(content):
            if old is None or old.size < len(content):
                self._report(f"{file.name}: has the content of {begins[0]}, so it is not learnt from again")
                ledger.files[file.name] = replace(begins[1], modified=status[1])
            self.idle[file.name] = (*status, ledger.files[file.name])
            return []
        if begins and begins[0] != file.name:
            self._report(f"{file.name}: begins with the {begins[1].rows} rows of {begins[0]}; only those after are new")
        size, before = (begins[1].size, begins[1].rows) if begins else (0, 0)
        read = _parquet_rows(file, content) if file.suffix == ".parquet" else content[size:].split(b"\n")[:-1]
        ledger.files[file.name] = taken_whole(content, before + len(read), status[1])
        named = [(f"{file.name}: row {n}", row) for n, row in enumerate(read, before + 1)]
        if file.suffix == ".parquet":
            return named
        return [(where, json_of(line)) for where, line in named if line.strip()]

    def _arriving(self, file: Path, content: bytes, size: int, ledger: Ledger) -> bool:
        """Whether a new file may be a copy under way of a file that was taken: nothing of it was learnt from then.

        A file that is there is compared byte by byte. Of one that is gone the first line is known alone, so a file that
        begins with that line is left until its last line is whole: copies are cut anywhere, logs at line breaks.
        """
        for name in ledger.longer(content):
            other = self.path / name
            whole = size == len(content)
            if _begins(other, content) if other.is_file() else not whole:
                self._report(
                    f"{file.name}: begins as {name} does, so it is left until it is longer or goes on otherwise"
                )
                return True
        return False

    def _files(self) -> list[Path]:
        try:
            there = sorted(self.path.iterdir())
        except OSError as error:
            raise DataError(f"--source {self.path}: not readable ({error.strerror}); put the folder back") from error
        shown = [file for file in there if not file.name.startswith((".", "_"))]
        for file in shown:
            if file.suffix not in SUFFIXES and self._status(file):
                self._report(f"{file.name}: left alone; only files that end in {' or '.join(SUFFIXES)} are read")
        return [file for file in shown if file.suffix in SUFFIXES]

    def _status(self, file: Path) -> tuple[int, int] | None:
        """Size in bytes and time of a file; None, and one message, if it is gone or is no file."""
        try:
            found = file.stat()
        except FileNotFoundError:
            if file.is_symlink():
                self._report(f"{file.name}: is a link that leads nowhere, left alone")
            return None
        except OSError as error:
            self._report(f"{file.name}: not readable ({error.strerror}), left alone for now")
            return None
        if stat.S_ISDIR(found.st_mode):
            self._report(f"{file.name}: is a folder, left alone; put the files in it into {self.path}")
            return None
        if not stat.S_ISREG(found.st_mode):
            self._report(f"{file.name}: is no file, left alone")
            return None
        return found.st_size, found.st_mtime_ns

    def _complete(self, file: Path) -> bytes | None:
        """The content as far as it is complete; None if the file is gone."""
        try:
            content = file.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            self._report(f"{file.name}: not readable ({error.strerror}), left alone for now")
            return None
        whole = len(content) >= SMALLEST_PARQUET and content.endswith(PARQUET_MARK)
        end = len(content) * whole if file.suffix == ".parquet" else content.rfind(b"\n") + 1
        if end < len(content):
            self._report(f"{file.name}: its end is not there yet; what is missing is left for later")
        return content[:end]

    def _adopt(self, names: list[str]) -> dict[str, Any]:
        """Entries for files that an older version knew only by name: all that they hold now counts as taken."""
        ledger = Ledger({})
        for file in self._files():
            found = self._status(file) if file.name in names else None
            content = self._complete(file) if found else None
            if found and content:
                rows = 0 if file.suffix == ".parquet" else content.count(b"\n")
                ledger.files[file.name] = taken_whole(content, rows, found[1])
        self._report(f"{self.path}: its files were known by name alone; all that they hold now counts as learnt from")
        return ledger.to_json()

    def _report(self, line: str) -> None:
        if line not in self.reported:
            self.reported.add(line)
            self.messages.append(line)


def _begins(file: Path, content: bytes) -> bool:
    try:
        with file.open("rb") as stream:
            return stream.read(len(content)) == content
    except OSError:
        return False


def other_source(began: str, given: str) -> DataError:
    """The error where an output began with another source than the one given."""
    return DataError(f"--source: is {given}, but --output began with {began}; give that, or another --output")


def _parquet_rows(file: Path, content: bytes) -> list[Any]:
    with as_data_error(file), pq.ParquetFile(pa.BufferReader(content)) as source:
        return rows_of(frame_of(source.read(), str(file)))


def rows_of(frame: pl.DataFrame) -> list[dict[str, Any]]:
    """Rows as JSON lines would have them: numbers, times and bytes as text; lists and true and false stay so."""
    kept = (pl.List, pl.Array, pl.Boolean)
    return pl.DataFrame([c if isinstance(c.dtype, kept) else as_text(c) for c in frame]).to_dicts()


def json_of(text: bytes | None) -> Any:
    """What a line or a message holds; None where it is not JSON."""
    try:
        return json.loads(text or b"")
    except (ValueError, RecursionError):
        return None
