"""Messages in Avro's binary form, with or without Confluent's header, as rows of JSON."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

from flm_torchrec.data.keys import text_of_bytes
from flm_torchrec.documents import Unreadable, read_text
from flm_torchrec.errors import DataError
from flm_torchrec.safe_text import first_line
from flm_torchrec.training.follow.sources import BadRow

HEADER = 5
"""Bytes of Confluent's header: a zero, and the id of the schema as 32 bits, the highest first."""
NO_HEADER = -1
"""In place of the id, of a topic whose messages have no header."""
LONGEST_SCHEMA = 2**20
"""Bytes."""
NO_MESSAGE = (EOFError, ValueError, LookupError, TypeError, ArithmeticError, AssertionError, RecursionError)
"""What fastavro raises where the bytes are no message of the schema."""


@dataclass(frozen=True)
class AvroMessages:
    """The schemas that messages were written with."""

    schemas: Mapping[int, Any]
    """By the id in the header; a schema without an id has NO_HEADER for its key, and is the only one."""

    @classmethod
    def of(cls, option: str) -> AvroMessages:
        """From FILE, or ID=FILE,ID=FILE,….

        Raises:
            DataError: fastavro is not installed, or a file holds no schema of a record.
        """
        try:
            import fastavro.schema
        except ImportError as error:
            raise DataError("--avro-schema: needs fastavro; pip install 'flm_torchrec[avro]'") from error
        parts = [re.fullmatch(r"(\d+)=(.+)", part) for part in option.split(",")]
        files = {int(part[1]): part[2] for part in parts if part} if all(parts) else {NO_HEADER: option}
        schemas = {}
        for number, file in files.items():
            try:
                schema = json.loads(read_text(Path(file), LONGEST_SCHEMA))
                schemas[number] = fastavro.schema.parse_schema(schema)
            except (Unreadable, ValueError, KeyError, fastavro.schema.SchemaParseException) as error:
                raise DataError(f"--avro-schema {file}: no schema ({first_line(error)}); give a .avsc file") from error
            if not isinstance(schema, dict) or schema.get("type") != "record":
                raise DataError(f"--avro-schema {file}: is no record, as an event is; give the schema of the messages")
        return cls(schemas)

    def read(self, value: bytes | None, known: int | None) -> tuple[Any, int | None]:
        """A message → its row, and the id that the messages after it must have.

        Args:
            known: the id that the messages before had; None: none of them could be read. The first message that can be
                read decides whether the others have a header, and with which id, so that one of another schema is
                never read by accident.
        """
        value = value or b""
        number = int.from_bytes(value[1:HEADER], "big") if value[:1] == b"\0" and len(value) > HEADER else NO_HEADER
        if NO_HEADER not in self.schemas:
            if number not in self.schemas:
                return BadRow("no schema id of --avro-schema"), known
            return _message(value[HEADER:], self.schemas[number]) or BadRow("not of its Avro schema"), known
        schema = self.schemas[NO_HEADER]
        framed = _message(value[HEADER:], schema) if number != NO_HEADER and known in (None, number) else None
        bare = _message(value, schema) if known in (None, NO_HEADER) else None
        if (framed is None) == (bare is None):
            return BadRow("not of its Avro schema" if framed is None else "readable with and without a header"), known
        return (framed, number) if framed is not None else (bare, NO_HEADER)


def _message(data: bytes, schema: Any) -> dict[str, Any] | None:
    """The record that the bytes are, all of them; None where they are none."""
    from fastavro import schemaless_reader

    stream = io.BytesIO(data)
    try:
        record = schemaless_reader(stream, schema, None)
    except NO_MESSAGE:
        return None
    return _plain(record) if stream.tell() == len(data) else None


def _plain(value: Any) -> Any:
    """A value of fastavro as `json.loads` would give it: bytes, times and decimals are text."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, bytes):
        return text_of_bytes(value)
    if isinstance(value, Decimal):
        return f"{value:f}"
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    return str(value) if isinstance(value, UUID) else value
