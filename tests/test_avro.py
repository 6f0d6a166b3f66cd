"""Messages of Kafka in Avro: each is one row, or is counted as one that cannot be read, never another row."""

from __future__ import annotations

import io
import json
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flm_torchrec.errors import DataError
from flm_torchrec.training.follow.avro import NO_HEADER, AvroMessages
from flm_torchrec.training.follow.sources import BadRow, open_source

fastavro = pytest.importorskip("fastavro", reason="install flm_torchrec[avro]")

EVENT = {
    "type": "record",
    "name": "Event",
    "fields": [
        {"name": "user", "type": ["null", "string"]},
        {"name": "item", "type": {"type": "record", "name": "Item", "fields": [{"name": "id", "type": "bytes"}]}},
        {"name": "timestamp", "type": {"type": "long", "logicalType": "timestamp-millis"}},
        {"name": "value", "type": {"type": "bytes", "logicalType": "decimal", "precision": 6, "scale": 2}},
        {"name": "tags", "type": {"type": "array", "items": "string"}},
    ],
}
OTHER = {
    "type": "record",
    "name": "Order",
    "fields": [{"name": "user", "type": "string"}, {"name": "amount", "type": "double"}],
}
SAID = {
    "user": "u1",
    "item": {"id": b"sku\xc3\xa9"},
    "timestamp": datetime(2024, 1, 2, 3, 4, 5, tzinfo=UTC),
    "value": Decimal("1.50"),
    "tags": ["a"],
}
ROW = {
    "user": "u1",
    "item": {"id": "skué"},
    "timestamp": "2024-01-02T03:04:05+00:00",
    "value": "1.50",
    "tags": ["a"],
}


def message(schema: dict[str, Any], record: dict[str, Any], number: int | None = None) -> bytes:
    stream = io.BytesIO()
    fastavro.schemaless_writer(stream, schema, record)
    return (b"" if number is None else b"\0" + number.to_bytes(4, "big")) + stream.getvalue()


@pytest.fixture
def schema(tmp_path: Path) -> str:
    file = tmp_path / "event.avsc"
    file.write_text(json.dumps(EVENT))
    return str(file)


@pytest.mark.parametrize("number", [None, 0, 7, 2**31])
def test_a_message_is_read_with_and_without_a_header(schema: str, number: int | None) -> None:
    avro = AvroMessages.of(schema)
    row, known = avro.read(message(EVENT, SAID, number), None)
    assert row == ROW and known == (NO_HEADER if number is None else number)
    nobody = message(EVENT, SAID | {"user": None}, number)
    assert avro.read(nobody, known) == (ROW | {"user": None}, known)
    for other in (None, 0, 7, 8):
        if other != number:  # the first message decides
            assert avro.read(message(EVENT, SAID, other), known) == (BadRow("not of its Avro schema"), known)


def test_messages_of_another_schema_are_no_rows(schema: str) -> None:
    avro = AvroMessages.of(schema)
    bad = [b"", None, b"\0", b'{"user": "u1"}', message(OTHER, {"user": "u1", "amount": 2.0}, 7)]
    bad += [message(EVENT, SAID, 7) + b"\0", message(EVENT, SAID, 7)[:-1]]
    for value in bad:
        for known in (None, 7, NO_HEADER):
            row, after = avro.read(value, known)
            assert isinstance(row, BadRow) and after == known


@given(st.binary(max_size=60), st.sampled_from([None, 7, NO_HEADER]))
@settings(max_examples=60)
def test_no_bytes_end_the_follower(data: bytes, known: int | None) -> None:
    avro = AvroMessages({NO_HEADER: fastavro.parse_schema(EVENT)})
    row, _ = avro.read(data, known)
    assert isinstance(row, dict | BadRow)
    json.dumps(row if isinstance(row, dict) else row.reason)


def test_a_schema_for_each_id(schema: str, tmp_path: Path) -> None:
    (tmp_path / "order.avsc").write_text(json.dumps(OTHER))
    avro = AvroMessages.of(f"7={schema},9={tmp_path / 'order.avsc'}")
    assert avro.read(message(EVENT, SAID, 7), None) == (ROW, None)
    assert avro.read(message(OTHER, {"user": "u1", "amount": 2.0}, 9), None)[0] == {"user": "u1", "amount": 2.0}
    assert avro.read(message(EVENT, SAID, 9), None)[0] == BadRow("not of its Avro schema")
    for value in (message(EVENT, SAID, 8), message(EVENT, SAID)):
        assert avro.read(value, None)[0] == BadRow("no schema id of --avro-schema")


def test_a_topic_of_avro_goes_on_with_the_schema_that_it_began_with(schema: str) -> None:
    kafka = pytest.importorskip("confluent_kafka")
    producer = kafka.Producer({"test.mock.num.brokers": 1})  # a broker of librdkafka's own, in this process
    broker = next(iter(producer.list_topics("events", 10).brokers.values()))
    for value in (b"{}", message(EVENT, SAID, 7), message(EVENT, SAID, 8), message(EVENT, SAID, 7)):
        producer.produce("events", value, partition=0)
    producer.flush(10)
    source = open_source(f"kafka://{broker.host}:{broker.port}/events", schema)
    position = source.resume({})
    found: list[Any] = []
    while len(found) < 4:
        chunk = source.after(position)
        assert chunk is not None
        found += [row for _, row in chunk.rows]
        position = chunk.position
    assert [row if isinstance(row, dict) else None for row in found] == [None, ROW, None, ROW]
    assert position["schema_id"] == 7 and source.resume(position) == position


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no schema"),
        ("{", "no schema"),
        ('{"type": "record", "name": "E", "fields": [{"name": "a", "type": "nothing"}]}', "no schema"),
        ('{"type": "array", "items": "string"}', "is no record"),
    ],
)
def test_a_schema_that_is_none_is_one_line(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "x.avsc").write_text(content)
    with pytest.raises(DataError, match=message) as told:
        AvroMessages.of(str(tmp_path / "x.avsc"))
    assert "\n" not in str(told.value)


def test_only_kafka_has_avro(schema: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="only messages of Kafka are Avro"):
        open_source(str(tmp_path), schema)
    monkeypatch.setitem(__import__("sys").modules, "fastavro.schema", None)
    with pytest.raises(DataError, match=r"pip install 'flm_torchrec\[avro\]'"):
        AvroMessages.of(schema)
