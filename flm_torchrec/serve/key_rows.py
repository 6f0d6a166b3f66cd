"""Rows by key, for millions of keys: sorted hashes beside the Arrow array of the keys."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping
from itertools import chain
from typing import Any
from zlib import crc32

import numpy as np
import pyarrow as pa

from flm_torchrec.export.mapped import IN_MEMORY, MappedFiles

CHUNK = 65_536
"""Keys that are Python objects at once."""
MOST_FOUND = 10_000
"""Keys whose rows are kept once they were found: a dict answers in a twentieth of the time."""


class KeyRows(Mapping[str, int]):
    """The row of each key of an array of distinct strings. It has 8 bytes a key, a dict has about 148.

    Args:
        name: of the array in `mapped`.
        left_out: rows whose keys are not found.
    """

    def __init__(
        self,
        keys: pa.Array,
        name: str = "keys",
        mapped: MappedFiles = IN_MEMORY,
        left_out: Collection[int] = (),
    ) -> None:
        self.texts = keys
        self.left_out = frozenset(left_out)
        self.hashed = mapped.array(name, self._hashed)  # [keys to find] uint64, ascending: CRC-32, then the row
        self.numbers = self.hashed.data  # the same as Python's numbers, for a search of one key
        self.found: dict[str, int] = {}

    def _hashed(self) -> np.ndarray:
        hashes = np.empty(len(self.texts), np.uint64)
        for start in range(0, len(self.texts), CHUNK):
            part = self.texts[start : start + CHUNK].to_pylist()
            hashes[start : start + len(part)] = [crc32(key.encode()) for key in part]
        hashed = hashes << np.uint64(32) | np.arange(len(hashes), dtype=np.uint64)
        hashed = np.delete(hashed, sorted(self.left_out))
        hashed.sort()
        return hashed

    def __getitem__(self, key: str) -> int:
        row = self.found.get(key)
        if row is None:
            row = self._search(key)
            if len(self.found) >= MOST_FOUND:
                self.found.clear()
            self.found[key] = row
        return row

    def get(self, key: str, default: Any = None) -> Any:
        """As of a mapping."""
        row = self.found.get(key)
        return super().get(key, default) if row is None else row

    def _search(self, key: str) -> int:
        least = crc32(key.encode("utf-8", "replace")) << 32
        first = bisect_left(self.numbers, least)
        while first < len(self.numbers) and self.numbers[first] >> 32 == least >> 32:
            row = self.numbers[first] & 0xFFFFFFFF
            if self.texts[row].as_py() == key:
                return row
            first += 1
        raise KeyError(key)

    def __iter__(self) -> Iterator[str]:
        parts = (self.texts[start : start + CHUNK].to_pylist() for start in range(0, len(self.texts), CHUNK))
        return (key for row, key in enumerate(chain.from_iterable(parts)) if row not in self.left_out)

    def __len__(self) -> int:
        return len(self.hashed)
