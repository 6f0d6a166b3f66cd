"""Files and folders that are whole or not there, and one writer at a time.

What is being written lies beside its place as `.NAME.flm-new-…`, what it replaces waits as `.NAME.flm-old-…` between
two renames, and `.NAME.flm-lock` says which process writes. Only paths with such a name are ever cleared away.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from flm_torchrec.errors import RunError

MARK = ".flm-"
LEFT = re.compile(r"\.(.+)\.flm-(new|old)-[0-9a-f]{16}", re.DOTALL)
"""A temporary name: that of the folder or file it stands for, and what it is."""
ANOTHER = "give another --output"


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def telling(folder: Path, instead: str = ANOTHER) -> Iterator[None]:
    """What a file system says while `folder`, or a file, is written, as one line.

    Args:
        instead: what else the user may do.

    Raises:
        RunError: in place of any OSError.
    """
    try:
        yield
    except OSError as error:
        # An error of a write names no file, one of a temporary file names what nobody knows.
        where = folder if error.filename is None or MARK in str(error.filename) else error.filename
        reason = error.strerror or str(error).splitlines()[0]
        raise RunError(f"{where}: {reason}; mend that, or {instead}") from error


def resolved(path: Path) -> Path:
    """Where a link leads to, the folder or file itself is.

    Raises:
        OSError: links lead round in a circle.
    """
    try:
        return path.resolve()
    except RuntimeError as error:
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path)) from error


def temporary(path: Path, kind: Literal["new", "old"], token: str = "") -> Path:
    """A name beside `path` that nobody else uses.

    Args:
        token: 16 hexadecimal digits, where several processes have to use one name; empty: drawn.
    """
    path = resolved(path)
    return path.with_name(f".{path.name}{MARK}{kind}-{token or secrets.token_hex(8)}")


def write_text(file: Path, text: str) -> None:
    """Write a file that a reader never finds half of; see `replacing_file`."""
    if file.exists() and not file.is_file() and not file.is_dir():
        file.write_text(text, encoding="utf-8")  # a pipe or a device, such as /dev/null
        return
    with replacing_file(file) as fresh:
        fresh.write_text(text, encoding="utf-8")


@contextmanager
def replacing_file(file: Path) -> Iterator[Path]:
    """A new file that takes the place of `file` at the end, with its mode, and is gone if that fails.

    Raises:
        OSError: it cannot be written; what was there is kept.
    """
    file = resolved(file)
    fresh = temporary(file, "new")
    older = file.stat() if file.exists() else None
    os.close(os.open(fresh, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666 if older is None else 0o600))
    try:
        yield fresh
        if older is not None:
            _give(fresh, older, stat.S_IMODE(older.st_mode))
        sync(fresh)
        fresh.replace(file)
        sync(file.parent)
    finally:
        fresh.unlink(missing_ok=True)


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A new folder that takes the place of `folder` at the end, and is gone if that fails; see `put_in_place`."""
    fresh = new_folder(folder)
    try:
        yield fresh
        put_in_place(fresh, folder)
    finally:
        remove(fresh)


def new_folder(folder: Path, token: str = "") -> Path:
    """Make an empty folder beside `folder`, for `put_in_place`; nobody else may look into it if an older one is there.

    Raises:
        OSError: it cannot be made, or `folder` can never be replaced.
    """
    folder = resolved(folder)
    _check_replaceable(folder)
    fresh = temporary(folder, "new", token)
    make_parent(folder)
    fresh.mkdir(mode=0o700 if folder.exists() else 0o777)
    return fresh


def make_parent(path: Path) -> None:
    """Make the folder that `path` is to lie in.

    Raises:
        OSError: it cannot be made; named if a file is in its place.
    """
    if path.parent.exists() and not path.parent.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path.parent))
    path.parent.mkdir(parents=True, exist_ok=True)


def put_in_place(fresh: Path, folder: Path) -> None:
    """Put a whole new folder where an older one may be, which is then gone; its modes and owners stay.

    All is on the disk before the older one goes. A link stays one: what it leads to is replaced. After a kill between
    the two renames `mend` brings the older one back. Claim the folder first.

    Raises:
        OSError: `folder` is no folder, or cannot be replaced; it is kept.
    """
    folder = resolved(folder)
    _check_replaceable(folder)
    older = temporary(folder, "old") if folder.exists() else None
    if older is not None:
        _keep_modes(folder, fresh)
    _sync_all(fresh)
    if older is not None:
        folder.rename(older)
    try:
        fresh.rename(folder)
    except OSError:
        if older is not None:
            older.rename(folder)
        raise
    sync(folder.parent)
    if older is not None:
        remove(older)


def mend(folder: Path) -> None:
    """Undo what a kill left of replacing `folder`. Only whoever has claimed it may."""
    folder = resolved(folder)
    _mend(leftovers(folder.parent, folder.name))


def mend_inside(folder: Path) -> None:
    """`mend` everything that lies in a folder. Only whoever has claimed that folder may."""
    _mend(leftovers(folder))


def leftovers(parent: Path, name: str | None = None) -> list[Path]:
    """Temporary files and folders in `parent`, of all or of what has this name."""
    if not parent.is_dir():
        return []
    found = [(path, LEFT.fullmatch(path.name)) for path in sorted(parent.iterdir()) if not path.is_symlink()]
    return [path for path, match in found if match and name in (None, match[1])]


def _mend(left: list[Path]) -> None:
    for path in left:
        name, kind = LEFT.fullmatch(path.name).groups()  # type: ignore[union-attr]
        place = path.with_name(name)
        if kind == "old" and not os.path.lexists(place):
            path.rename(place)
            sync(place.parent)
    for path in left:
        remove(path)


def remove(path: Path) -> None:
    """Remove a temporary file or folder; what cannot be removed, such as files open elsewhere on NFS, is left."""
    assert LEFT.fullmatch(path.name), path
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    for folder, _, _ in os.walk(path):
        with suppress(OSError):
            os.chmod(folder, 0o700)  # files in a read-only folder cannot be removed
    shutil.rmtree(path, ignore_errors=True)


def discard(path: Path) -> None:
    """Remove a folder of our own: whole or, after a kill, under a temporary name, never half of it in its place."""
    fresh = temporary(path, "new")
    path.rename(fresh)
    remove(fresh)


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_all(folder: Path) -> None:
    for inside, _, files in os.walk(folder):
        for name in files:
            if not (Path(inside) / name).is_symlink():
                sync(Path(inside) / name)
        sync(Path(inside))


def _check_replaceable(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "is a file, not a folder", str(folder))
    if os.path.ismount(folder):
        raise OSError(errno.EBUSY, "is a mount point, which cannot be replaced (name a folder in it)", str(folder))


def _keep_modes(older: Path, fresh: Path) -> None:
    """Modes and owners as of the same names in `older`; what has a new name gets what all older ones allow."""
    before = _stats(older)
    common: dict[bool, int] = {}
    for found in before.values():
        kind = stat.S_ISDIR(found.st_mode)
        common[kind] = common.get(kind, 0o7777) & stat.S_IMODE(found.st_mode)
    top = before[Path()]
    for name, found in _stats(fresh).items():
        kind = stat.S_ISDIR(found.st_mode)
        same = before.get(name)
        if same is not None and stat.S_ISDIR(same.st_mode) == kind:
            _give(fresh / name, same, stat.S_IMODE(same.st_mode))
        else:
            _give(fresh / name, top, common.get(kind, stat.S_IMODE(found.st_mode) & stat.S_IMODE(top.st_mode)))


def _stats(folder: Path) -> dict[Path, os.stat_result]:
    """Of a folder and all that is in it but links, by name within it; what is inside comes first."""
    found = {}
    for inside, folders, files in os.walk(folder, topdown=False):
        for name in [*files, *folders]:
            path = Path(inside) / name
            if not path.is_symlink():
                found[path.relative_to(folder)] = path.stat()
    return {**found, Path(): folder.stat()}


def _give(path: Path, like: os.stat_result, mode: int) -> None:
    if os.geteuid() == 0:  # only root writes folders that are another's
        with suppress(PermissionError):  # on a disk that takes root for nobody
            os.chown(path, like.st_uid, like.st_gid)
    os.chmod(path, mode)
