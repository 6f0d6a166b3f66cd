"""Files that are whole or not there, and how to tell that one is still what it was."""

from __future__ import annotations

import hashlib
from pathlib import Path


def write_text(file: Path, text: str) -> None:
    """Write under a temporary name and rename, so that a reader never finds half of it."""
    fresh = file.with_name(file.name + ".tmp")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(file)


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
