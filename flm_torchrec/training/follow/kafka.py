"""New events from a Kafka topic."""

from __future__ import annotations

import time
from typing import Any

from flm_torchrec.errors import DataError
from flm_torchrec.training.follow.avro import AvroMessages
from flm_torchrec.training.follow.sources import Chunk, json_of, other_source

CHUNK_MESSAGES = 10_000
"""Maximum of messages in a chunk."""
PATIENCE = 5.0
"""Seconds in which Kafka must answer, or bring the first message of a chunk."""
LINGER = 0.5
"""Seconds in which Kafka may bring the other messages."""
CRITICAL = 2
"""Level of syslog."""
RELIST = 30.0
"""Seconds after which the partitions of a topic are listed again."""


class KafkaTopic:
    """Messages of all partitions. The checkpoint holds the offsets; none is committed to Kafka.

    Args:
        avro: how the messages are read; None: they are JSON objects.
    """

    def __init__(self, servers: str, topic: str, avro: AvroMessages | None = None) -> None:
        try:
            import confluent_kafka
        except ImportError as error:
            raise DataError("--source kafka://: needs confluent-kafka; pip install 'flm_torchrec[kafka]'") from error
        self.kafka = confluent_kafka
        self.topic = topic
        self.avro = avro
        self.messages: list[str] = []
        settings = {"bootstrap.servers": servers, "group.id": "flm_torchrec", "enable.auto.commit": False}
        settings |= {"log_level": CRITICAL}  # it logs each try to connect; a failure is raised, or is in `messages`
        self.consumer = confluent_kafka.Consumer({**settings, "auto.offset.reset": "error"})
        try:
            listing = self.consumer.list_topics(topic, PATIENCE)
        except confluent_kafka.KafkaException as error:
            raise DataError(f"kafka://{servers}/{topic}: {error.args[0].str()}; is the broker there?") from error
        if listing.topics[topic].error is not None:
            raise DataError(f"kafka://{servers}/{topic}: {listing.topics[topic].error.str()}; make the topic first")
        self.cluster = listing.cluster_id or ""
        self.partitions = sorted(listing.topics[topic].partitions)
        self.listed = time.monotonic()
        self.assigned = False

    def resume(self, position: dict[str, Any]) -> dict[str, Any]:
        """As of `EventSource`. A topic is known by its name and its cluster, whose brokers may change."""
        if "files" in position:
            raise other_source("a folder", f"topic {self.topic}")
        if position and "offsets" not in position:  # of an older version: the offsets alone
            position = {"offsets": position}
            self.messages.append(f"the position names no topic; it is taken for one of {self.topic}")
        began = position.get("topic", self.topic)
        if began != self.topic:
            raise other_source(f"topic {began}", f"topic {self.topic}")
        if self.cluster and (position.get("cluster") or self.cluster) != self.cluster:
            raise other_source(f"topic {began} of another Kafka cluster", f"topic {self.topic}")
        return self._position(position.get("offsets", {}), position.get("schema_id"))

    def after(self, position: dict[str, Any]) -> Chunk | None:
        """As of `EventSource`; after the first call, the position must be that of the chunk before."""
        if time.monotonic() - self.listed >= RELIST:
            self._list_again()
        saved = position.get("offsets", {})
        offsets = {str(p): saved.get(str(p), self.kafka.OFFSET_BEGINNING) for p in self.partitions}
        if not self.assigned:
            self.consumer.assign([self.kafka.TopicPartition(self.topic, int(p), o) for p, o in offsets.items()])
            self.assigned = True
        first = self.consumer.poll(PATIENCE)
        if first is None:
            return None
        messages = [first, *self.consumer.consume(CHUNK_MESSAGES - 1, LINGER)]
        for message in messages:
            error, offset = message.error(), message.offset()
            if error is not None or offset is None:
                raise DataError(f"kafka topic {self.topic}: {error}; events behind the saved position may be gone")
            offsets[str(message.partition())] = offset + 1
        rows: list[tuple[str, Any]] = []
        schema_id = position.get("schema_id")
        for message in messages:
            row, schema_id = self._row(message.value(), schema_id)
            rows.append((f"{self.topic}: partition {message.partition()}, offset {message.offset()}", row))
        left = {partition: offset for partition, offset in offsets.items() if offset >= 0}
        return Chunk(f"{len(rows)} messages", rows, self._position(left, schema_id))

    def _row(self, value: bytes | None, schema_id: int | None) -> tuple[Any, int | None]:
        return (json_of(value), schema_id) if self.avro is None else self.avro.read(value, schema_id)

    def _position(self, offsets: dict[str, int], schema_id: int | None) -> dict[str, Any]:
        known = {} if schema_id is None else {"schema_id": schema_id}
        return {"topic": self.topic, "cluster": self.cluster, "offsets": offsets, **known}

    def _list_again(self) -> None:
        """Read partitions that were added from their start; the other partitions stay at their offsets."""
        self.listed = time.monotonic()
        try:
            listed = sorted(self.consumer.list_topics(self.topic, PATIENCE).topics[self.topic].partitions)
        except self.kafka.KafkaException as error:
            self.messages.append(
                f"topic {self.topic}: its partitions could not be listed again ({error.args[0].str()})"
            )
            return
        if added := sorted(set(listed) - set(self.partitions)):
            self.messages.append(
                f"topic {self.topic}: new partitions {', '.join(map(str, added))}, read from their start"
            )
            self.partitions = sorted({*self.partitions, *added})
            self.assigned = False
