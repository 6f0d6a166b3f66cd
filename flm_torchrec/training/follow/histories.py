"""What a follower knows of events: the end of each history, how often items occur, when ids were last seen."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from flm_torchrec.data.admission import LastSeen
from flm_torchrec.data.dataset import PreparedData
from flm_torchrec.training.follow.events import NewEvents, append, newest
from flm_torchrec.training.follow.growth import DAY
from flm_torchrec.training.job import Job


class Histories:
    """The newest events of each user, and statistics of all events.

    Args:
        job: of the run that is followed.
        keep: events of each user that are kept.
        expire_after: days without an event after which an id expires; 0: never.
    """

    def __init__(self, job: Job, keep: int, expire_after: int) -> None:
        data, stats = job.data, job.train_stats
        self.data, self.learned_from = newest(data, job.events.learned_from, keep)
        self.keep = keep
        self.expire_after = expire_after
        self.counts = data.item_counts(job.events.learned_from)
        self.train_stats = replace(stats, items=stats.items.copy(), users=stats.users.copy())
        self.users_seen, self.items_seen = LastSeen(data.schema.users), LastSeen(data.schema.items)
        for block in data.blocks():
            self.users_seen.see(block.users, data.timestamp[block.rows])
            self.items_seen.see(data.item[block.rows], data.timestamp[block.rows])
        self.now = 0

    def take_in(self, grown: PreparedData) -> None:
        """Go on with the users and items of the grown data, whose events are not read."""
        schema, stats = grown.schema, self.train_stats
        more_users, more_items = schema.users - self.data.schema.users, schema.items - self.data.schema.items
        offsets = np.concatenate([self.data.offsets, np.full(more_users, self.data.offsets[-1])])
        self.data = replace(self.data, schema=schema, items=grown.items, users=grown.users, offsets=offsets)
        self.counts = np.concatenate([self.counts, np.zeros(more_items, self.counts.dtype)])
        self.train_stats = replace(
            stats,
            items=np.concatenate([stats.items, np.zeros(more_items, np.float32)]),
            users=np.concatenate([stats.users, np.zeros(more_users, np.float32)]),
        )
        self.users_seen.extend(schema.users)
        self.items_seen.extend(schema.items)

    def append(self, new: NewEvents) -> np.ndarray:
        """Add events to the histories, of which only the end is kept → [interactions] bool: which are new."""
        data, learned_from = newest(self.data, self.learned_from, self.keep)
        self.data, self.learned_from, is_new = append(data, learned_from, new)
        np.add.at(self.counts, new.item, 1)
        self.train_stats.items[new.item] = 1.0
        self.train_stats.users[new.user] = 1.0
        self.users_seen.see(new.user, new.timestamp)
        self.items_seen.see(new.item, new.timestamp)
        self.now = max(self.now, int(new.timestamp.max(initial=0)))
        return is_new

    @property
    def learnable(self) -> np.ndarray:
        """[interactions] bool: events to learn from; those of items that have expired count as if they had not been."""
        return self.learned_from & (self.train_stats.items[self.data.item] > 0)

    def expire(self) -> dict[str, np.ndarray]:
        """By "user" and "item", [n] ids that expire now: they count as unknown, and are not drawn as negatives."""
        if not self.expire_after:
            return {}
        stats, after = self.train_stats, self.expire_after * DAY
        users = np.flatnonzero(self.users_seen.expired(self.now, after) & (stats.users > 0))
        items = np.flatnonzero(self.items_seen.expired(self.now, after) & (stats.items > 0))
        stats.users[users], stats.items[items], self.counts[items] = 0.0, 0.0, 0
        return {"user": users, "item": items}
