"""Rows by key, for millions of keys: sorted hashes beside the Arrow array of the keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from zlib import crc32

import numpy as np
import pyarrow as pa

from flm_torchrec.export.mapped import IN_MEMORY, MappedFiles

CHUNK = 65_536
"""Keys that are Python objects at once."""


class KeyRows(Mapping[str, int]):
    """The row of each key of an array of distinct strings. It has 8 bytes a key, a dict has about 148.

    Args:
        name: of the array in `mapped`.
    """

    def __init__(self, keys: pa.Array, name: str = "keys", mapped: MappedFiles = IN_MEMORY) -> None:
        self.texts = keys
        self.hashed = mapped.array(name, self._hashed)  # [keys] uint64, ascending: CRC-32 of a key, then its row

    def _hashed(self) -> np.ndarray:
        hashes = np.empty(len(self.texts), np.uint64)
        for start in range(0, len(self.texts), CHUNK):
            part = self.texts[start : start + CHUNK].to_pylist()
            hashes[start : start + len(part)] = [crc32(key.encode()) for key in part]
        hashed = hashes << np.uint64(32) | np.arange(len(hashes), dtype=np.uint64)
        hashed.sort()
        return hashed

    def __getitem__(self, key: str) -> int:
        least = crc32(key.encode("utf-8", "replace")) << 32
        first = int(np.searchsorted(self.hashed, np.uint64(least)))
        while first < len(self.hashed) and int(self.hashed[first]) >> 32 == least >> 32:
            row = int(self.hashed[first]) & 0xFFFFFFFF
            if self.texts[row].as_py() == key:
                return row
            first += 1
        raise KeyError(key)

    def __iter__(self) -> Iterator[str]:
        parts = (self.texts[start : start + CHUNK].to_pylist() for start in range(0, len(self.texts), CHUNK))
        return chain.from_iterable(parts)

    def __len__(self) -> int:
        return len(self.texts)
