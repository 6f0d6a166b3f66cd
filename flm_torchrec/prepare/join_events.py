"""The events of several prepared data sets → one sequence for each user, in time order, a bucket of users at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from flm_torchrec.data.event_files import EVENT_COLUMNS, WEIGHT, RowChecks
from flm_torchrec.data.row_groups import RowGroups
from flm_torchrec.data.schema import Schema
from flm_torchrec.prepare.blocks import ROWS_PER_GROUP
from flm_torchrec.prepare.events_per_user import EventsPerUser
from flm_torchrec.prepare.interactions import ROWS_PER_BUCKET, InteractionCounts


@dataclass(frozen=True)
class DomainEvents:
    """The events of one domain, and what its ids are in the joint data."""

    groups: RowGroups
    offsets: np.ndarray  # [own users + 1] int64: first row of each user
    users: np.ndarray  # [own users] int64: id of each in the joint data
    first_item: int
    """Id in the joint data of the domain's first item; the others follow in their order."""
    events: np.ndarray  # [own kinds of events] int32: code of each in the joint data
    contexts: Mapping[str, np.ndarray] = field(default_factory=dict)
    """By column of a feature of events, [own codes] int32: code of each in the joint data; empty: it has no such
    column, and all are unknown."""

    @classmethod
    def first_rows(cls, groups: RowGroups, schema: Schema) -> np.ndarray:
        """[users + 1] int64: the first row of each user.

        Raises:
            DataError: an id is outside the schema, or users are not in order.
        """
        checks = RowChecks(groups.path, schema)
        for columns in groups.scan(["user_id", "item_id", "event"]):
            checks.add(*columns)
        return checks.offsets

    def parts(self, number: int, domains: int, timed: bool) -> Iterator[pl.DataFrame]:
        """The rows with the ids of the joint data, in parts, and by what they are sorted: `at`, `domain` and `row`.

        Args:
            number: of this domain, of so many `domains`.
            timed: `at` is the time; else the place of this domain among those of the user, which stay together: one
                user begins with the first domain, the next one with the second, so that each is learnt after others.
        """
        row = 0
        for batch in self.groups.batches(["user_id", *EVENT_COLUMNS], ["segment", WEIGHT, *self.contexts]):
            own = batch["user_id"].to_numpy()
            rows = np.arange(row, row + len(own))
            row += len(own)
            time = batch["timestamp"].to_numpy()
            columns = {
                "user_id": self.users[own],
                "item_id": batch["item_id"].to_numpy().astype(np.int64) + self.first_item,
                "timestamp": time.astype(np.int64),
                "event": self.events[batch["event"].to_numpy()],
                "value": batch["value"].to_numpy(),
                WEIGHT: batch[WEIGHT].to_numpy() if WEIGHT in batch.schema.names else np.ones(len(own), np.float32),
                "at": time.astype(np.int64) if timed else (self.users[own] + number) % domains,
                "domain": np.full(len(own), number, np.int16),
                "row": rows,
                **{name: _recoded(batch, name, codes) for name, codes in self.contexts.items()},
            }
            segments = batch["segment"] if "segment" in batch.schema.names else pa.nulls(len(own), pa.string())
            yield pl.DataFrame(columns).with_columns(pl.Series("segment", segments, dtype=pl.String))


def _recoded(batch: pa.RecordBatch, name: str, codes: np.ndarray) -> np.ndarray:
    """[n] int32 codes of a feature of events in the joint data, -1 where unknown."""
    own = batch[name].to_numpy() if len(codes) and name in batch.schema.names else np.full(batch.num_rows, -1)
    return np.append(codes, np.int32(-1))[own]  # place -1 is the last


def write_joined(
    domains: Sequence[DomainEvents], users: int, folder: Path, work: Path, *, timed: bool
) -> InteractionCounts:
    """Write the events of all domains sorted by user, time, domain and order in the domain; a file a bucket of users.

    Args:
        users: number of users of the joint data.
        folder: to write the files to.
        work: empty folder for intermediate files.
        timed: all domains have timestamps. Else the timestamp becomes the position in the user's joint sequence.
    """
    per_user = np.zeros(users, np.int64)
    for domain in domains:
        np.add.at(per_user, domain.users, np.diff(domain.offsets))
    bucket_of = (np.cumsum(per_user) - per_user) // ROWS_PER_BUCKET  # [users]
    more = [name for name in ("segment", WEIGHT) if any(domain.groups.has(name) for domain in domains)]
    more += domains[0].contexts
    _deal(domains, bucket_of, work, timed)
    folder.mkdir()
    pairs = 0
    for part, bucket in enumerate(sorted(work.iterdir())):
        frame = pl.read_parquet(sorted(bucket.iterdir()), glob=False).sort("user_id", "at", "domain", "row")
        if not timed:
            frame = frame.with_columns(timestamp=pl.int_range(pl.len(), dtype=pl.Int64).over("user_id"))
        frame = frame.select("user_id", *EVENT_COLUMNS, *more)
        pq.write_table(frame.to_arrow(), folder / f"part-{part:05d}.parquet", row_group_size=ROWS_PER_GROUP)
        pairs += frame.select("user_id", "item_id").n_unique()
    counts = EventsPerUser()
    counts.add(per_user)
    return InteractionCounts(counts, 0, pairs)


def _deal(domains: Sequence[DomainEvents], bucket_of: np.ndarray, work: Path, timed: bool) -> None:
    """Write each part's rows of each bucket to a file `work/BUCKET/DOMAIN-PART.parquet`."""
    for number, domain in enumerate(domains):
        for part, frame in enumerate(domain.parts(number, len(domains), timed)):
            of_row = bucket_of[frame["user_id"].to_numpy()]
            for bucket in np.unique(of_row).tolist():
                file = work / f"{bucket:06d}" / f"{number:05d}-{part:07d}.parquet"
                file.parent.mkdir(exist_ok=True)
                frame.filter(of_row == bucket).write_parquet(file)
