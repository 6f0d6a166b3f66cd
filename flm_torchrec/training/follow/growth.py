"""Users and items that a follower took in: their files, the data with them, and the vocabulary that others read.

Numbers of known users and items stay; new ones come behind them. Each time that new ones come in, two files in the
folder of the follower's events get their rows: `users-NNNNNN.parquet` and `items-NNNNNN.parquet`, with the columns of
the prepared data. Rows of items that came in without features, and get them now, are in `described-NNNNNN.parquet`.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flm_torchrec.data.admission import LastSeen
from flm_torchrec.data.columns import CodedText, EventBlock
from flm_torchrec.data.dataset import EntityFeatures, PreparedData, load_entity
from flm_torchrec.data.event_files import WEIGHT, as_data_error, context_columns
from flm_torchrec.data.history import CONTEXT, NO_CONTEXT, Events
from flm_torchrec.data.schema import Entity, Schema
from flm_torchrec.data.splits import Examples, Splits
from flm_torchrec.data.train_stats import TrainStats
from flm_torchrec.files import replacing_file
from flm_torchrec.folders import SCHEMA
from flm_torchrec.training.follow.events import FIELDS, LEARNED, NewEvents, append_on_disk

ENTITIES: tuple[Entity, ...] = ("user", "item")
DESCRIBED = "described"
DAY = 86400


@dataclass(frozen=True)
class FollowedData(PreparedData):
    """The data of a follower's run: the prepared ones, with the users, items and events that it took in."""

    before: PreparedData
    """With the new users and items, without the new events."""
    own_fingerprint: str
    """Of the prepared data."""
    is_new: np.ndarray  # [interactions] bool
    expired_items: np.ndarray  # [items] bool
    expired_users: np.ndarray  # [users] bool

    @cached_property
    def fingerprint(self) -> str:
        """That of the prepared data."""
        return self.own_fingerprint

    def placed(self, splits: Splits) -> Splits:
        """Splits of `before` → the same splits of these data: new events are neither validated nor tested on."""
        before, last = self.before, max(0, len(self.before.item) - 1)

        def place_of(block: EventBlock) -> np.ndarray:
            here = block.within(self.offsets)
            return here.start + np.flatnonzero(~self.is_new[here])

        place = before.column(np.int64, place_of)
        ends = np.where(
            splits.train_end == before.offsets[1:], self.offsets[1:], place[np.minimum(splits.train_end, last)]
        )
        valid, test = (Examples(e.user, place[e.end], e.label) for e in (splits.valid, splits.test))
        held = None
        if splits.held_out is not None:
            known = self.placed_mask(splits.held_out)
            held = self.column(bool, lambda b: known[b.rows] & ~self.is_new[b.rows])
        return replace(splits, train_end=ends, valid=valid, test=test, held_out=held)

    def placed_mask(self, mask: np.ndarray) -> np.ndarray:
        """A mask of the events of `before` → [interactions] bool, with all that is new."""

        def placed(block: EventBlock) -> np.ndarray:
            new = self.is_new[block.rows]
            chosen = new.copy()
            chosen[~new] = mask[block.within(self.before.offsets)]
            return chosen

        return self.column(bool, placed)

    def stats(self, seen: np.ndarray, values: bool) -> TrainStats:
        """Statistics of the events `seen` [interactions] bool; mean and spread of values are those of the run's own."""
        known = TrainStats.of(self, seen, values)

        def of_own(block: EventBlock) -> np.ndarray:
            here = block.within(self.offsets)
            return seen[here][~self.is_new[here]]

        own = TrainStats.of(self.before, self.before.column(bool, of_own), values)
        return replace(
            own,
            items=np.where(self.expired_items, 0, known.items).astype(np.float32),
            users=np.where(self.expired_users, 0, known.users).astype(np.float32),
        )


def part_file(folder: Path, kind: str, number: int) -> Path:
    """A file of a follower's folder of events. `kind`: part (of events), user, item or described."""
    return folder / f"{kind + 's' if kind in ENTITIES else kind}-{number:06d}.parquet"


def write_growth(folder: Path, number: int, users: pa.Table, items: pa.Table, described: pa.Table) -> None:
    """Write the files of new users and items, and of items with new features; each is complete or not there."""
    for kind, table in zip((*ENTITIES, DESCRIBED), (users, items, described), strict=True):
        with replacing_file(part_file(folder, kind, number)) as fresh:
            pq.write_table(table, fresh)


def user_table(columns: pa.Schema, first: int, keys: list[str]) -> pa.Table:
    """Rows of users.parquet for new users, numbered from `first` on; nothing is known of them but the key."""
    rows = [{"user_id": first + n, "user_key": key} for n, key in enumerate(keys)]
    return pa.Table.from_pylist(rows, schema=columns.remove_metadata())


def with_growth(data: PreparedData, folder: Path, growths: int) -> PreparedData:
    """Prepared data with the first `growths` files of new users and items, who have no events there.

    Raises:
        DataError: a file is missing or broken.
    """
    users, items = (_joined(data, folder, entity, growths) for entity in ENTITIES)
    more = len(users.dense) - data.schema.users
    return replace(
        data,
        schema=replace(data.schema, users=len(users.dense), items=len(items.dense)),
        offsets=np.concatenate([data.offsets, np.full(more, data.offsets[-1])]),
        items=items,
        users=users,
    )


def _joined(data: PreparedData, folder: Path, entity: Entity, growths: int) -> EntityFeatures:
    features = data.users if entity == "user" else data.items
    for number in range(growths):
        file = part_file(folder, entity, number)
        with as_data_error(file):
            rows = pq.read_metadata(file).num_rows
        if rows:
            features = features + load_entity(file, data.schema, entity, rows)
    if entity == "user":
        return features
    late = _described(folder, growths)
    order = _order(len(features.dense), list(late.values()))
    for file, ids in late.items():
        features = features + load_entity(file, data.schema, entity, len(ids))
    return features.take(order) if late else features


def _described(folder: Path, growths: int) -> dict[Path, np.ndarray]:
    """The files of items that got features later, each with the [n] ids there. Older versions wrote none."""
    found = {}
    for file in (part_file(folder, DESCRIBED, number) for number in range(growths)):
        if file.exists():
            with as_data_error(file):
                found[file] = pq.read_table(file, columns=["item_id"])["item_id"].to_numpy()
    return {file: ids for file, ids in found.items() if len(ids)}


def _order(items: int, described: list[np.ndarray]) -> np.ndarray:
    """[items] where the row of each item is, if those of the items `described` come behind all others."""
    order = np.arange(items)
    ids = np.concatenate([np.zeros(0, np.int64), *described])
    order[ids] = items + np.arange(len(ids))
    return order


def read_events(folder: Path, number: int) -> NewEvents:
    """The events of a chunk that was learned from.

    Raises:
        DataError: the file is missing or broken.
    """
    file = part_file(folder, "part", number)
    with as_data_error(file):
        table = pq.read_table(file)
    columns = {name: table[name].to_numpy() for name in (*FIELDS, WEIGHT) if name in table.column_names}
    contexts = [table[name].to_numpy() for name in table.column_names if name.startswith(CONTEXT)]
    return NewEvents(**columns, context=np.stack(contexts, 1) if contexts else NO_CONTEXT)


def event_table(new: NewEvents, schema: Schema) -> pa.Table:
    """The events of a chunk as `read_events` reads them."""
    contexts = dict(zip(context_columns(schema), new.context.T, strict=True))
    names = (*FIELDS, *((WEIGHT,) if schema.weights else ()))
    return pa.table({**{name: getattr(new, name) for name in names}, **contexts})


def followed_data(run: Path, data: PreparedData, taken: dict[str, int]) -> FollowedData:
    """The data of a follower's run.

    Args:
        data: the prepared data of the run, with their events on disk.
        taken: `published` of the follower's state: how much of its folder belongs to the model.

    Raises:
        DataError: a file is missing or broken.
    """
    folder = run / LEARNED
    before = with_growth(data, folder, taken["growths"])
    parts: list[Events] = [read_events(folder, number) for number in range(taken["parts"])]
    grown, is_new, now = before, before.no_events, 0
    if parts:
        new: NewEvents = NewEvents.concat(parts)
        now = int(new.timestamp.max(initial=0))
        grown, is_new = append_on_disk(before, new)
    columns = {f.name: getattr(grown, f.name) for f in fields(PreparedData)}
    if (segment := before.segment) is not None:

        def codes(block: EventBlock) -> np.ndarray:
            found = np.full(block.rows.stop - block.rows.start, len(segment.names), np.int32)
            found[~is_new[block.rows]] = segment.codes[block.within(before.offsets)]
            return found

        columns["segment"] = CodedText(np.append(segment.names, ""), grown.column(np.int32, codes))
    if taken["growths"]:
        columns["path"] = run / "vocabulary"
    users, items = LastSeen(before.schema.users), LastSeen(before.schema.items)
    for block in grown.blocks():
        users.see(block.users, grown.timestamp[block.rows])
        items.see(grown.item[block.rows], grown.timestamp[block.rows])
    expired = [np.zeros(len(seen.time), bool) for seen in (users, items)]
    if taken["expire_after"]:
        expired = [seen.expired(now, taken["expire_after"] * DAY) for seen in (users, items)]
    return FollowedData(
        **columns,
        before=before,
        own_fingerprint=data.fingerprint,
        is_new=is_new,
        expired_users=expired[0],
        expired_items=expired[1],
    )


def growth_files(folder: Path) -> list[Path]:
    """The files of new users, in order."""
    return sorted(folder.glob("users-*.parquet"))


def publish_vocabulary(data: Path, folder: Path, growths: int, target: Path) -> None:
    """Write what the rows of a follower's model stand for into its folder `vocabulary`: all columns, and the values.

    Each file is replaced in one step, and only ever gets longer: a reader takes as many rows as its model has.

    Args:
        data: prepared data of the run.
        folder: of the follower's events.
        growths: number of the files of new users and items.
        target: the folder `vocabulary`.
    """
    counts: dict[Entity, int] = {}
    for entity in ENTITIES:
        files = [data / f"{entity}s.parquet", *(part_file(folder, entity, number) for number in range(growths))]
        late = _described(folder, growths) if entity == "item" else {}
        tables = [pq.read_table(file) for file in (*files, *late)]
        table = pa.concat_tables(t.cast(tables[0].schema.remove_metadata()) for t in tables)
        counts[entity] = len(table) - sum(map(len, late.values()))
        if late:
            table = table.take(_order(counts[entity], list(late.values())))
        with replacing_file(target / f"{entity}s.parquet") as fresh:
            pq.write_table(table, fresh)
    with replacing_file(target / "report.json") as fresh:
        shutil.copy(data / "report.json", fresh)
    schema = Schema.load(data / SCHEMA)
    with replacing_file(target / SCHEMA) as fresh:
        replace(schema, users=counts["user"], items=counts["item"]).save(fresh)
