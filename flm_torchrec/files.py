"""Writing files and folders so that a reader finds a complete one or none.

The new version is written beside its target as `.NAME.flm-new-…`. Between two renames the old version is called
`.NAME.flm-old-…`. The lock `.NAME.flm-lock` names the process that writes. Only paths with such names are ever removed.
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

from flm_torchrec.errors import ConfigError, RunError

MARK = ".flm-"
LEFTOVER = re.compile(r"\.(.+)\.flm-(new|old)-[0-9a-f]{16}", re.DOTALL)
"""A temporary name. Its groups are the name of the target, and `new` or `old`."""
ANOTHER = "give another --output"


def path_of(value: object, name: str) -> Path:
    """The path that a caller gave as the argument `name`.

    Raises:
        ConfigError: it is none.
    """
    if not isinstance(value, str | os.PathLike):
        raise ConfigError(f"{name}: is a {type(value).__name__}; give a path")
    return Path(value)


def sha256(file: Path) -> str:
    """Hexadecimal SHA-256 of the content of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def telling(folder: Path, instead: str = ANOTHER) -> Iterator[None]:
    """Turn file-system errors into one line that names the path, while `folder` (or a file) is written.

    Args:
        instead: what the user may do otherwise.

    Raises:
        RunError: in place of any OSError.
    """
    try:
        yield
    except OSError as error:
        # Some errors name no file, and others name a temporary file, which the user does not know.
        where = folder if error.filename is None or MARK in str(error.filename) else error.filename
        reason = error.strerror or str(error).splitlines()[0]
        raise RunError(f"{where}: {reason}; mend that, or {instead}") from error


def resolved(path: Path) -> Path:
    """The target of a link, or the path itself, made absolute.

    Raises:
        OSError: the links form a loop.
    """
    try:
        return path.resolve()
    except RuntimeError as error:
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path)) from error


def temporary(path: Path, kind: Literal["new", "old"], token: str = "") -> Path:
    """A temporary name beside `path` that nothing else uses.

    Args:
        token: 16 hexadecimal digits, for processes that must agree on the name; empty: random digits.
    """
    path = resolved(path)
    return path.with_name(f".{path.name}{MARK}{kind}-{token or secrets.token_hex(8)}")


def write_text(file: Path, text: str) -> None:
    """Write a text file; a reader never finds a part of it. See `replacing_file`."""
    if file.exists() and not file.is_file() and not file.is_dir():
        file.write_text(text, encoding="utf-8")  # a pipe or a device, such as /dev/null
        return
    with replacing_file(file) as fresh:
        fresh.write_text(text, encoding="utf-8")


@contextmanager
def replacing_file(file: Path) -> Iterator[Path]:
    """Yield a temporary file, which replaces `file` at the end and keeps its mode. It is removed if that fails.

    Raises:
        OSError: the file cannot be written; the old file stays.
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
    """Yield a new folder, which replaces `folder` at the end. It is removed if that fails. See `put_in_place`."""
    fresh = new_folder(folder)
    try:
        yield fresh
        put_in_place(fresh, folder)
    finally:
        remove(fresh)


def new_folder(folder: Path, token: str = "") -> Path:
    """Make an empty folder beside `folder` for `put_in_place`. If `folder` exists, only its owner can read the new one.

    Raises:
        OSError: the folder cannot be made, or `folder` cannot be replaced.
    """
    folder = resolved(folder)
    _check_replaceable(folder)
    fresh = temporary(folder, "new", token)
    make_parent(folder)
    fresh.mkdir(mode=0o700 if folder.exists() else 0o777)
    return fresh


def make_parent(path: Path) -> None:
    """Make the parent folder of `path`.

    Raises:
        OSError: the parent cannot be made; the error names a file that is in its place.
    """
    if path.parent.exists() and not path.parent.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path.parent))
    path.parent.mkdir(parents=True, exist_ok=True)


def put_in_place(fresh: Path, folder: Path) -> None:
    """Move a complete new folder to `folder`. An older folder there is removed; its modes and owners are kept.

    All data are on the disk before the older folder is removed. If `folder` is a link, its target is replaced. After a
    kill between the two renames, `mend` restores the older folder. The caller must have claimed the folder.

    Raises:
        OSError: `folder` is no folder, or cannot be replaced; the older folder stays.
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
    """Undo a replacement of `folder` that a kill interrupted. The caller must have claimed the folder."""
    folder = resolved(folder)
    _mend(leftovers(folder.parent, folder.name))


def mend_inside(folder: Path) -> None:
    """`mend` everything inside a folder. The caller must have claimed that folder."""
    _mend(leftovers(folder))


def leftovers(parent: Path, name: str | None = None) -> list[Path]:
    """Temporary files and folders in `parent`: all, or those of one target."""
    if not parent.is_dir():
        return []
    matches = [(path, LEFTOVER.fullmatch(path.name)) for path in sorted(parent.iterdir()) if not path.is_symlink()]
    return [path for path, match in matches if match and name in (None, match[1])]


def _mend(left: list[Path]) -> None:
    for path in left:
        name, kind = LEFTOVER.fullmatch(path.name).groups()  # type: ignore[union-attr]
        target = path.with_name(name)
        if kind == "old" and not os.path.lexists(target):
            path.rename(target)
            sync(target.parent)
    for path in left:
        remove(path)


def remove(path: Path) -> None:
    """Remove a temporary file or folder. Files that cannot be removed, such as open files on NFS, stay."""
    assert LEFTOVER.fullmatch(path.name), path
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    for folder, _, _ in os.walk(path):
        with suppress(OSError):
            os.chmod(folder, 0o700)  # files in a read-only folder cannot be removed
    shutil.rmtree(path, ignore_errors=True)


def discard(path: Path) -> None:
    """Remove a folder of this package. After a kill the folder is complete, or has a temporary name."""
    fresh = temporary(path, "new")
    path.rename(fresh)
    remove(fresh)


def sync(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
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
    """Copy modes and owners from the same names in `older`. New names get the mode that all older ones allow."""
    before = _stats(older)
    common: dict[bool, int] = {}
    for status in before.values():
        kind = stat.S_ISDIR(status.st_mode)
        common[kind] = common.get(kind, 0o7777) & stat.S_IMODE(status.st_mode)
    top = before[Path()]
    for name, status in _stats(fresh).items():
        kind = stat.S_ISDIR(status.st_mode)
        same = before.get(name)
        if same is not None and stat.S_ISDIR(same.st_mode) == kind:
            _give(fresh / name, same, stat.S_IMODE(same.st_mode))
        else:
            _give(fresh / name, top, common.get(kind, stat.S_IMODE(status.st_mode) & stat.S_IMODE(top.st_mode)))


def _stats(folder: Path) -> dict[Path, os.stat_result]:
    """The status of a folder and of everything in it except links, by relative path. Contents come before folders."""
    stats = {}
    for inside, folders, files in os.walk(folder, topdown=False):
        for name in [*files, *folders]:
            path = Path(inside) / name
            if not path.is_symlink():
                stats[path.relative_to(folder)] = path.stat()
    return {**stats, Path(): folder.stat()}


def _give(path: Path, like: os.stat_result, mode: int) -> None:
    if os.geteuid() == 0:  # only root can change the owner
        with suppress(PermissionError):  # on a disk that maps root to nobody
            os.chown(path, like.st_uid, like.st_gid)
    os.chmod(path, mode)
