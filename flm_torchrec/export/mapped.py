"""Large arrays of an export in files that several processes map, so that they are in memory once."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa

from flm_torchrec.errors import RunError


@dataclass(frozen=True)
class MappedFiles:
    """Arrays by name: the first process that asks for one makes it, and all map its file.

    An object without a folder shares nothing: arrays are in the memory of this process.
    """

    folder: Path | None = None
    """Holds nothing but these files; only one process at a time asks for arrays in it."""
    held: IO[str] | None = None
    """Is open, and locked, for as long as the folder is needed."""

    def arrays(self, name: str, count: int, make: Callable[[], Sequence[np.ndarray]]) -> list[np.ndarray]:
        """The `count` arrays that `make` gives."""
        if self.folder is None:
            return list(make())
        files = [self.folder / f"{name}.{position}.npy" for position in range(count)]
        if not all(file.exists() for file in files):
            for file, array in zip(files, make(), strict=True):
                self._write(file, partial(np.save, arr=array, allow_pickle=False))
        # "c": PyTorch takes no arrays that are read-only. Nothing writes to these, so all processes share the pages.
        return [np.asarray(np.load(file, mmap_mode="c", allow_pickle=False)) for file in files]

    def array(self, name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        """The array that `make` gives."""
        return self.arrays(name, 1, lambda: [make()])[0]

    def table(self, name: str, make: Callable[[], pa.Table]) -> pa.Table:
        """The table that `make` gives, each column in one chunk."""
        if self.folder is None:
            return make().combine_chunks()
        file = self.folder / f"{name}.arrow"
        if not file.exists():
            table = make().combine_chunks()
            self._write(file, lambda fresh: _write_table(table, fresh))
        with pa.memory_map(str(file)) as mapped:
            return pa.ipc.open_file(mapped).read_all()

    def copy(self, source: Path) -> Path:
        """A file with the content of `source`, which nobody changes; without a folder `source` itself."""
        if self.folder is None:
            return source
        file = self.folder / source.name
        if not file.exists():
            self._write(file, lambda fresh: shutil.copyfile(source, fresh))
        return file

    def once(self, name: str, do: Callable[[], None]) -> None:
        """Do something, unless a process has done it before for this folder."""
        if self.folder is None or not (self.folder / name).exists():
            do()
        if self.folder is not None:
            (self.folder / name).touch()

    def _write(self, file: Path, write: Callable[[Path], object]) -> None:
        """A process that is killed meanwhile leaves no part under the file's name.

        Raises:
            RunError: there is no space, or the folder cannot be written.
        """
        fresh = file.with_name(f"new-{secrets.token_hex(8)}{file.suffix}")
        try:
            write(fresh)
            os.replace(fresh, file)
        except OSError as error:
            fresh.unlink(missing_ok=True)
            reason = error.strerror or str(error)
            raise RunError(f"{file.parent}: {reason}; set TMPDIR to a folder with more space") from error


IN_MEMORY = MappedFiles()
"""Shares nothing."""


def _write_table(table: pa.Table, file: Path) -> None:
    with pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=max(1, len(table)))
