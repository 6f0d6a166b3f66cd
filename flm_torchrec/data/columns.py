"""Columns of events in as few bytes as they need; large ones are on disk and mapped, so that memory is no limit."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from functools import cached_property
from tempfile import TemporaryFile, gettempdir

import numpy as np
from numpy.typing import DTypeLike

from flm_torchrec.errors import DataError

LARGE = 2**27
"""Bytes from which on a column is mapped: the system may then take its memory back, and read it again."""
ON_DISK = "/var/tmp"
"""Folder of mapped columns unless TMPDIR names one; /tmp is in memory on many systems."""


def new_column(rows: int, dtype: DTypeLike) -> np.ndarray:
    """[rows] to be filled. A large one is a file without a name, which is gone when the process ends, however it ends.

    Raises:
        DataError: the disk is too small.
    """
    size = rows * np.dtype(dtype).itemsize
    if size < LARGE:
        return np.empty(rows, dtype)
    folder = ON_DISK if "TMPDIR" not in os.environ and os.access(ON_DISK, os.W_OK) else gettempdir()
    try:
        with TemporaryFile(prefix="flm-events-", dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, size)  # else a full disk ends the process while it writes to memory
            return np.frombuffer(mmap.mmap(file.fileno(), size), dtype)
    except OSError as error:
        raise DataError(
            f"{folder}: {size / 2**30:.1f} GiB for a column of {rows} events do not fit ({error.strerror}); set TMPDIR"
            " to a folder on a disk with more room"
        ) from error


def event_types(items: int, kinds: int) -> dict[str, np.dtype]:
    """By column that all interactions have, its type in memory: 17 bytes an event, where no id needs more."""
    return {
        "item_id": np.dtype(np.int32 if items <= 2**31 else np.int64),
        "timestamp": np.dtype(np.int64),
        "event": np.min_scalar_type(kinds - 1),
        "value": np.dtype(np.float32),
    }


@dataclass(frozen=True)
class EventBlock:
    """All events of neighbouring users."""

    first: int
    """The first of these users."""
    offsets: np.ndarray  # [users of the block + 1] int64: where the events of each begin

    @property
    def rows(self) -> slice:
        """Of the arrays of interactions."""
        return slice(int(self.offsets[0]), int(self.offsets[-1]))

    def within(self, offsets: np.ndarray) -> slice:
        """The same users' events in other arrays, by [users + 1] where those of each user begin."""
        return slice(int(offsets[self.first]), int(offsets[self.first + len(self.offsets) - 1]))

    @cached_property
    def users(self) -> np.ndarray:
        """[n] int64: the user of each event."""
        return np.repeat(np.arange(self.first, self.first + len(self.offsets) - 1), np.diff(self.offsets))


@dataclass(frozen=True)
class CodedText:
    """A text for each event, of few different ones."""

    names: np.ndarray  # [kinds] str
    codes: np.ndarray  # [events] int32, index into `names`

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, index: np.ndarray | slice) -> np.ndarray:
        """The texts of the events at an index."""
        return self.names[self.codes[index]]
