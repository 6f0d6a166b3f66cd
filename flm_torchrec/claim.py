"""One writer of a folder at a time: a lock that ends with its process, valid on all hosts that share the disk."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from flm_torchrec.errors import RunError
from flm_torchrec.files import ANOTHER, MARK, make_parent, mend, resolved, telling

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""Errors of file systems without locks, such as Lustre mounted without `flock`."""


class InUse(RunError):
    """Another process writes the folder."""


@contextmanager
def claim(folder: Path, instead: str = ANOTHER) -> Iterator[None]:
    """Lock a folder against other writers, and `mend` what a killed process left. Only one rank of a job claims.

    The lock is the file `.NAME.flm-lock` beside the folder, which names host and process. The kernel releases the lock
    when the process ends, in any way. Only the holder of the lock removes the file.

    Args:
        folder: need not exist. If it is a link, its target is claimed.
        instead: what the user may do instead of waiting.

    Raises:
        InUse: another process has the lock; the message names it.
        RunError: the file system has no locks.
    """
    with telling(folder, instead):
        folder = resolved(folder)
        make_parent(folder)
        handle = _lock(folder, instead)
    try:
        with telling(folder, instead):
            mend(folder)
        yield
    finally:
        with suppress(OSError):
            os.unlink(_lock_file(folder))
        os.close(handle)


def _lock_file(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}{MARK}lock")


def _lock(folder: Path, instead: str) -> int:
    """An open file that holds the lock."""
    file = _lock_file(folder)
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            _try_lock(handle, folder, instead)
            if _is_at(file, handle):
                _sign(handle, file, instead)
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its holder has removed the file meanwhile


def _sign(handle: int, file: Path, instead: str) -> None:
    """Write host and process into the lock file; RunError if the file is something else."""
    if os.fstat(handle).st_size and not _holder(handle):
        raise RunError(f"{file}: is no lock of flm, though it lies where one would; move it, or {instead}")
    os.truncate(handle, 0)
    os.pwrite(handle, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode(), 0)


def _try_lock(handle: int, folder: Path, instead: str) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = _holder(handle) or "another process"  # which has not written its name yet
        raise InUse(f"{folder}: {holder} is writing it; wait until that ends, or {instead}") from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        raise RunError(
            f"{folder}: its file system has no locks ({error.strerror}), so two jobs could write it at once; mount it"
            f" with locks (Lustre: -o flock), or {instead}"
        ) from error


def _holder(handle: int) -> str:
    """The process that has or had the lock; empty if the file does not name one."""
    try:
        holder = json.loads(os.pread(handle, 1000, 0))
        return f"process {int(holder['pid'])} on {str(holder['host'])!r}"
    except (ValueError, TypeError, KeyError):
        return ""


def _is_at(file: Path, handle: int) -> bool:
    """Whether the open file is still the one at this path."""
    try:
        return os.path.samestat(os.stat(file, follow_symlinks=False), os.fstat(handle))
    except FileNotFoundError:
        return False
