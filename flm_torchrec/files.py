"""Files that are whole or not there, and how to tell that one is still what it was."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flm_torchrec.errors import RunError


def write_text(file: Path, text: str) -> None:
    """Write under a temporary name and rename, so that a reader never finds half of it."""
    fresh = file.with_name(file.name + ".tmp")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(file)


def replace_folder(fresh: Path, folder: Path) -> None:
    """Put a whole new folder in the place of an older one, if there is one.

    A kill between the two renames leaves the older one beside it, as `.NAME.old`.
    """
    older = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(older, ignore_errors=True)
    if folder.exists():
        folder.rename(older)
    fresh.rename(folder)
    shutil.rmtree(older, ignore_errors=True)


@contextmanager
def telling(folder: Path) -> Iterator[None]:
    """What a file system says of the folder, as one line.

    Raises:
        RunError: in place of any OSError.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error).splitlines()[0]
        raise RunError(f"{error.filename or folder}: {reason}; mend that, or give another --output") from error


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
