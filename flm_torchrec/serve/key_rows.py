"""Rows by key, for millions of keys: a hash table of numbers beside the Arrow array of the keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from zlib import crc32

import numpy as np
import pyarrow as pa

CHUNK = 65_536
"""Keys that are Python objects at once."""


class KeyRows(Mapping[str, int]):
    """The row of each key of an array of distinct strings. It has 8 bytes a key, a dict has about 148.

    Keys are grouped by the lowest bits of their CRC-32, about one key a group.
    """

    def __init__(self, keys: pa.Array) -> None:
        self.texts = keys
        groups = 1 << max(0, len(keys) - 1).bit_length()
        self.mask = groups - 1
        hashes = np.empty(len(keys), np.uint32)
        for start in range(0, len(keys), CHUNK):
            part = keys[start : start + CHUNK].to_pylist()
            hashes[start : start + len(part)] = [crc32(key.encode()) for key in part]
        group = hashes & np.uint32(self.mask)
        self.rows = np.argsort(group, kind="stable").astype(np.int32)
        counts = np.bincount(group, minlength=groups)
        self.starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.uint32)

    def __getitem__(self, key: str) -> int:
        group = crc32(key.encode("utf-8", "replace")) & self.mask
        for row in self.rows[self.starts[group] : self.starts[group + 1]].tolist():
            if self.texts[row].as_py() == key:
                return int(row)
        raise KeyError(key)

    def __iter__(self) -> Iterator[str]:
        parts = (self.texts[start : start + CHUNK].to_pylist() for start in range(0, len(self.texts), CHUNK))
        return chain.from_iterable(parts)

    def __len__(self) -> int:
        return len(self.texts)
