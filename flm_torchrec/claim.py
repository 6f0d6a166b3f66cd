"""One job at a time in a folder: a lock that ends with the process, on all hosts that share the disk."""

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
"""What file systems without locks answer, such as Lustre mounted without `flock`."""


class InUse(RunError):
    """Another process has the folder."""


@contextmanager
def claim(folder: Path, instead: str = ANOTHER) -> Iterator[None]:
    """Keep others from writing a folder, and `mend` what a killed process left of it. Of a job's ranks one claims.

    The lock is a file beside the folder, `.NAME.flm-lock`, with host and process in it. The kernel gives the lock back
    when the process ends, however it ends; the file is removed by whoever has the lock.

    Args:
        folder: need not exist; of a link, what it leads to is claimed.
        instead: what the user may do other than wait.

    Raises:
        InUse: another process has it, named in the message.
        RunError: the file system does not take a lock.
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
            if _is_there(file, handle):
                if os.fstat(handle).st_size and not _holder(handle):
                    raise RunError(f"{file}: is no lock of flm, though it lies where one would; move it, or {instead}")
                me = json.dumps({"host": socket.gethostname(), "pid": os.getpid()})
                os.truncate(handle, 0)
                os.pwrite(handle, me.encode(), 0)
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its holder removed it meanwhile


def _try_lock(handle: int, folder: Path, instead: str) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = _holder(handle) or "another process"  # which has only just got it
        raise InUse(f"{folder}: {holder} is writing it; wait until that ends, or {instead}") from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        raise RunError(
            f"{folder}: its file system has no locks ({error.strerror}), so two jobs could write it at once; mount it"
            f" with locks (Lustre: -o flock), or {instead}"
        ) from error


def _holder(handle: int) -> str:
    """Who has, or had, the lock; empty if the file does not say."""
    try:
        found = json.loads(os.pread(handle, 1000, 0))
        return f"process {int(found['pid'])} on {str(found['host'])!r}"
    except (ValueError, TypeError, KeyError):
        return ""


def _is_there(file: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.stat(file, follow_symlinks=False), os.fstat(handle))
    except FileNotFoundError:
        return False
