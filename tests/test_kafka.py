"""Topics of Kafka, of a broker in this process; not in tests/training, which runs without the extras."""

from __future__ import annotations

import json
from typing import Any

import pytest

from flm_torchrec.errors import DataError
from flm_torchrec.training.follow import kafka as stream_kafka
from flm_torchrec.training.follow.sources import open_source


def test_a_topic_is_read_from_where_it_was_left(capfd: pytest.CaptureFixture[str]) -> None:
    kafka = pytest.importorskip("confluent_kafka")
    producer = kafka.Producer({"test.mock.num.brokers": 1})  # a broker of librdkafka's own, in this process
    broker = next(iter(producer.list_topics(timeout=10).brokers.values()))
    for number in range(5):
        producer.produce("events", json.dumps({"n": number}) if number != 3 else b"\xff{")
    producer.flush(10)
    url = f"kafka://{broker.host}:{broker.port}/events"
    source = open_source(url)
    chunk = source.after({})
    assert chunk is not None
    while len(chunk.rows) < 5:
        more = source.after(chunk.position)
        assert more is not None
        chunk = type(chunk)(more.name, chunk.rows + more.rows, more.position)
    values = [content for _, content in chunk.rows]
    assert sorted(row["n"] for row in values if row) == [0, 1, 2, 4] and values.count(None) == 1
    assert all(where.startswith("events: partition ") for where, _ in chunk.rows)
    producer.produce("events", json.dumps({"n": 5}))
    producer.flush(10)
    again = open_source(url).after(chunk.position)
    assert again is not None and [row["n"] for _, row in again.rows] == [5]
    capfd.readouterr()
    with pytest.raises(DataError, match=r"kafka://127.0.0.1:1/events.* is the broker there"):
        open_source("kafka://127.0.0.1:1/events")
    assert "rdkafka" not in capfd.readouterr().err


def test_a_topic_is_told_from_others_and_its_new_partitions_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    kafka = pytest.importorskip("confluent_kafka")
    monkeypatch.setattr(stream_kafka, "PATIENCE", 1.0)
    monkeypatch.setattr(stream_kafka, "RELIST", 0.0)
    producer = kafka.Producer({"test.mock.num.brokers": 1})  # a broker of librdkafka's own, in this process
    broker = next(iter(producer.list_topics("events", 10).brokers.values()))
    producer.list_topics("others", 10)
    for partition in (0, 1, 3):
        producer.produce("events", json.dumps({"n": partition}), partition=partition)
    producer.flush(10)
    address = f"kafka://{broker.host}:{broker.port}/"
    source = open_source(address + "events")
    assert isinstance(source, stream_kafka.KafkaTopic)
    source.partitions, source.listed = [0], float("inf")  # as if it had been all that there were
    found: list[Any] = []
    position = source.resume({})
    for wanted in (1, 3):
        while len(found) < wanted:
            chunk = source.after(position)
            if chunk is not None:
                found += [row["n"] for _, row in chunk.rows]
                position = chunk.position
        source.listed = 0.0
    assert found[0] == 0 and sorted(found[1:]) == [1, 3]
    assert source.messages == ["topic events: new partitions 1, 2, 3, read from their start"]
    assert source.resume(position) == position
    with pytest.raises(DataError, match="is topic others, but --output began with topic events"):
        open_source(address + "others").resume(position)
    with pytest.raises(DataError, match="began with topic events of another Kafka cluster"):
        source.resume({**position, "cluster": "elsewhere"})
    with pytest.raises(DataError, match="began with a folder"):
        source.resume({"files": ["a.jsonl"]})
    assert source.resume({"0": 7})["offsets"] == {"0": 7}
