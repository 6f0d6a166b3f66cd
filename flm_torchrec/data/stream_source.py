"""Where new events come from: a folder that files are put into, or a Kafka topic."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import polars as pl
import pyarrow.parquet as pq

from flm_torchrec.data.keys import as_text, frame_of
from flm_torchrec.data.prepared import told_as_data_error
from flm_torchrec.errors import DataError
from flm_torchrec.messages import first_line, redact_address

MESSAGES = 10_000
"""Of Kafka in a chunk, at most."""
PATIENCE = 5.0
"""Seconds in which Kafka must answer, or bring the first message of a chunk."""
LINGER = 0.5
"""Seconds in which it may bring the others."""
PARQUET_END = b"PAR1"


@dataclass(frozen=True)
class Chunk:
    """Rows that are learnt from together."""

    name: str
    rows: list[tuple[str, Any]]
    """Where each stands, for the report, and what it holds; None where that cannot be read."""
    position: dict[str, Any]
    """Of the source, after these rows: what `Source.after` is given to go on behind them."""


class Source(Protocol):
    """Gives the same rows after the same position, if it still has them."""

    def after(self, position: dict[str, Any]) -> Chunk | None:
        """The next chunk; None if there is nothing new at the moment.

        Raises:
            DataError: the source cannot be read.
        """


def open_source(url: str) -> Source:
    """The source that `url` names: a folder, or kafka://HOST:PORT/TOPIC.

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
        return KafkaTopic(parts.netloc, parts.path.strip("/"))
    if parts.scheme:
        raise DataError(f"--source {shown}: '{parts.scheme}' is not known; give a folder or kafka://HOST:PORT/TOPIC")
    if not Path(url).is_dir():
        raise DataError(f"--source {shown}: no such folder; make it, or give kafka://HOST:PORT/TOPIC")
    return Folder(Path(url))


class Folder:
    """A chunk a file, in order of their names. Files must not change once they are whole.

    A file is whole if it ends as its format does: Parquet by its footer, JSONL by a line break. Hidden files and
    those with other endings are left alone.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.readers = {".parquet": _parquet_rows, ".jsonl": _json_rows}

    def after(self, position: dict[str, Any]) -> Chunk | None:
        done = position.get("files", [])
        for file in sorted(self.path.iterdir()):
            wanted = file.suffix in self.readers and not file.name.startswith((".", "_"))
            if wanted and file.name not in done and _whole(file):
                rows = [(f"{file.name}: row {n}", row) for n, row in enumerate(self.readers[file.suffix](file), 1)]
                return Chunk(file.name, rows, {"files": [*done, file.name]})
        return None


def _whole(file: Path) -> bool:
    end = PARQUET_END if file.suffix == ".parquet" else b"\n"
    with file.open("rb") as stream:
        size = stream.seek(0, 2)
        stream.seek(max(0, size - len(end)))
        return stream.read() == end


def _parquet_rows(file: Path) -> list[Any]:
    """Rows as JSON lines would have them: numbers, times and bytes of every type as text."""
    with told_as_data_error(file), pq.ParquetFile(file) as source:
        frame = frame_of(source.read())
    return pl.DataFrame([as_text(column) for column in frame]).to_dicts()


def _json_rows(file: Path) -> Iterator[Any]:
    with file.open("rb") as lines:
        for line in lines:
            yield _json(line)


def _json(text: bytes | None) -> Any:
    try:
        return json.loads(text or b"")
    except (ValueError, RecursionError):
        return None


class KafkaTopic:
    """Messages of JSON objects, of all partitions. Offsets are kept with the checkpoint, none is committed to Kafka."""

    def __init__(self, servers: str, topic: str) -> None:
        try:
            import confluent_kafka
        except ImportError as error:
            raise DataError("--source kafka://: needs confluent-kafka; pip install 'flm_torchrec[kafka]'") from error
        self.kafka = confluent_kafka
        self.topic = topic
        settings = {"bootstrap.servers": servers, "group.id": "flm_torchrec", "enable.auto.commit": False}
        self.consumer = confluent_kafka.Consumer({**settings, "auto.offset.reset": "error"})
        try:
            found = self.consumer.list_topics(topic, PATIENCE).topics[topic]
        except confluent_kafka.KafkaException as error:
            raise DataError(f"kafka://{servers}/{topic}: {error.args[0].str()}; is the broker there?") from error
        if found.error is not None:
            raise DataError(f"kafka://{servers}/{topic}: {found.error.str()}; make the topic first")
        self.partitions = sorted(found.partitions)
        self.assigned = False

    def after(self, position: dict[str, Any]) -> Chunk | None:
        """As of `Source`; a position is that of the chunk before, but for the first call."""
        offsets = {str(p): position.get(str(p), self.kafka.OFFSET_BEGINNING) for p in self.partitions}
        if not self.assigned:
            self.consumer.assign([self.kafka.TopicPartition(self.topic, int(p), o) for p, o in offsets.items()])
            self.assigned = True
        first = self.consumer.poll(PATIENCE)
        if first is None:
            return None
        messages = [first, *self.consumer.consume(MESSAGES - 1, LINGER)]
        for message in messages:
            error, offset = message.error(), message.offset()
            if error is not None or offset is None:
                raise DataError(f"kafka topic {self.topic}: {error}; events behind the saved position may be gone")
            offsets[str(message.partition())] = offset + 1
        rows = [(f"{self.topic}: partition {m.partition()}, offset {m.offset()}", _json(m.value())) for m in messages]
        return Chunk(f"{len(rows)} messages", rows, {p: o for p, o in offsets.items() if o >= 0})
