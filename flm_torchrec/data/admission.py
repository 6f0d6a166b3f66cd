"""Which ids are worth a row, and which no longer are: admission by count, expiry by time. Memory is fixed."""

from __future__ import annotations

import numpy as np

from flm_torchrec.data.hashing import mix

DEPTH = 4
"""Counters of an id. The smallest of them is the count: others may be shared with ids that are seen more often."""
WIDTH = 2**20
"""Counters of each of the DEPTH rows: 4 MiB in all."""
MOST_COUNTED = 255
"""A counter is one byte."""
NEVER = -1
"""Time of an id that was never seen."""


class Admission:
    """Counts the sightings of ids that have no row, in fixed memory, however many ids there are.

    A count-min sketch (Cormode & Muthukrishnan, J. Algorithms 2005) with conservative update (Estan & Varghese,
    SIGCOMM 2002): a count is never too small, and too large only where all DEPTH counters are shared. After every
    `width` / 4 sightings all counts are halved (as TinyLFU does: Einziger et al., ACM TOS 2017), so that the counters
    do not fill up with ids that are seen once, and sightings of long ago count for less.

    Args:
        after: an id is admitted from this sighting on, 1 … MOST_COUNTED.
        width: counters of each row.
    """

    def __init__(self, after: int, width: int = WIDTH) -> None:
        self.after = after
        self.counts = np.zeros((DEPTH, width), np.uint8)
        self.since = np.zeros(1, np.int64)
        """Sightings since the counts were halved."""
        self.period = width // 4
        self.seeds = mix(np.arange(1, DEPTH + 1))

    def count(self, hashes: np.ndarray) -> np.ndarray:
        """Sightings [n] uint64, by a hash of the id, in their order → [n] bool: admitted with this sighting."""
        admitted, start = np.zeros(len(hashes), bool), 0
        while start < len(hashes):
            stop = start + self.period - int(self.since[0])
            admitted[start:stop] = self._count(hashes[start:stop])
            self.since += len(hashes[start:stop])
            if self.since[0] == self.period:
                self.counts >>= 1
                self.since[:] = 0
            start = stop
        return admitted

    def state(self) -> dict[str, np.ndarray]:
        """All that counting depends on, by name; filled in place, it resumes there."""
        return {"counts": self.counts, "since": self.since}

    def _count(self, hashes: np.ndarray) -> np.ndarray:
        ids, index, sightings = np.unique(hashes, return_inverse=True, return_counts=True)
        cells = [(mix(ids ^ seed) % np.uint64(self.counts.shape[1])).astype(np.int64) for seed in self.seeds]
        before = np.min([row[cell] for row, cell in zip(self.counts, cells, strict=True)], axis=0).astype(np.int64)
        counted = np.minimum(before + sightings, MOST_COUNTED).astype(np.uint8)
        for row, cell in zip(self.counts, cells, strict=True):
            np.maximum.at(row, cell, counted)
        order = np.argsort(index, kind="stable")
        nth = np.empty(len(hashes), np.int64)  # of the id's sightings here, counted from 1
        nth[order] = np.arange(1, len(hashes) + 1) - np.repeat(np.cumsum(sightings) - sightings, sightings)
        return before[index] + nth >= self.after


class LastSeen:
    """When each id was last seen: 8 bytes a row, however many events there are.

    Args:
        rows: number of ids.
    """

    def __init__(self, rows: int) -> None:
        self.time = np.full(rows, NEVER, np.int64)

    def extend(self, rows: int) -> None:
        """Go on with so many ids; those that are new were never seen."""
        self.time = np.concatenate([self.time, np.full(rows - len(self.time), NEVER, np.int64)])

    def see(self, ids: np.ndarray, timestamps: np.ndarray) -> None:
        """Events of ids [n] at times [n] int64, in any order."""
        np.maximum.at(self.time, ids, timestamps)

    def expired(self, now: int, after: int) -> np.ndarray:
        """[rows] bool: seen before, but not since `after` seconds before `now`."""
        return (self.time != NEVER) & (self.time < now - after)
