"""The temporary folder of one server of several processes: counts of requests, and arrays of exports that all map."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import IO

from flm_torchrec.export.manifest import Manifest
from flm_torchrec.export.mapped import IN_MEMORY, MappedFiles

PREFIX = "flm-serve-"
LOCK = "lock"
"""A file that is locked for as long as a process needs the folder."""
METRICS, EXPORTS = "metrics", "exports"


@dataclass(frozen=True)
class SharedExports:
    """Arrays of the exports that a server's processes load. Without a folder each has its own in memory."""

    folder: Path | None = None

    @contextmanager
    def files(self, manifest: Manifest) -> Iterator[MappedFiles]:
        """The files of one export. Only one process at a time is here: the first makes the files, the others wait.

        They stay until no process has the object any more; those of exports that nobody has are removed.
        """
        if self.folder is None:
            yield IN_MEMORY
            return
        with (self.folder / LOCK).open("w") as turn:
            fcntl.flock(turn, fcntl.LOCK_EX)
            name = sha256(json.dumps(asdict(manifest), sort_keys=True).encode()).hexdigest()
            for other in self.folder.iterdir():
                if other.is_dir() and other.name != name:
                    remove_unused(other)
            files = self.folder / name
            files.mkdir(exist_ok=True)
            held = (files / LOCK).open("w")
            fcntl.flock(held, fcntl.LOCK_SH)
            yield MappedFiles(files, held)


NOT_SHARED = SharedExports()


@contextmanager
def server_folder() -> Iterator[Path]:
    """A folder of this process and its forks, with folders for `METRICS` and `EXPORTS`; it is removed at the end.

    Folders of servers all of whose processes were killed are removed too.
    """
    parent = Path(tempfile.gettempdir())
    for left in parent.glob(f"{PREFIX}*"):
        remove_unused(left)
    fresh = Path(tempfile.mkdtemp(prefix=f".{PREFIX}"))
    with (fresh / LOCK).open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # forks have it too, until the last of them ends
        for name in (METRICS, EXPORTS):
            (fresh / name).mkdir()
        folder = parent / f"{PREFIX}{secrets.token_hex(8)}"
        fresh.rename(folder)  # only now, since others remove a folder with this name that is not locked
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def remove_unused(folder: Path) -> None:
    """Remove a folder of this user whose lock nobody holds; any other stays."""
    with suppress(OSError):
        if folder.is_symlink() or folder.stat().st_uid != os.getuid():
            return
        with (folder / LOCK).open("r+") as lock:
            if _free(lock):
                shutil.rmtree(folder, ignore_errors=True)


def _free(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
