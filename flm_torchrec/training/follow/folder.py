"""Which part of a file has been taken already, known by content: the file may have grown, changed or been renamed."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Taken:
    """The part of a file that has been learned from: its first `size` bytes."""

    size: int
    sha256: str
    rows: int
    modified: int = 0
    """Nanoseconds since 1970, as the file system had it: a file with this time and size is not read again."""
    first: str = ""
    """Digest of the first line; empty in a position of an older version."""


class Ledger:
    """What was taken of every file, by name, in the order in which it was taken."""

    def __init__(self, files: dict[str, Any]) -> None:
        self.files = {name: Taken(**entry) for name, entry in files.items()}

    def to_json(self) -> dict[str, Any]:
        """By name of a file, the fields of `Taken`; what `Ledger` is made from."""
        return {name: asdict(taken) for name, taken in self.files.items()}

    def begins_with(self, content: bytes, there: Collection[str]) -> tuple[str, Taken] | None:
        """The longest beginning of the content that has been taken before, and the name it was taken under.

        Args:
            there: other files that are in the folder now. One of them matches only if the content is all of it. A
                file that is gone may have been renamed and have grown, so it matches a beginning as well.
        """
        by_size: dict[int, dict[str, str]] = {}
        for name, taken in self.files.items():
            if taken.size < len(content) and name in there:
                continue
            by_size.setdefault(taken.size, {}).setdefault(taken.sha256, name)
        digest, done, longest = hashlib.sha256(), 0, None
        for size in sorted(size for size in by_size if size <= len(content)):
            digest.update(memoryview(content)[done:size])
            done = size
            longest = by_size[size].get(digest.hexdigest(), longest)
        return None if longest is None else (longest, self.files[longest])

    def longer(self, content: bytes) -> list[str]:
        """Names of files with the first line of the content, of which more than the content was taken."""
        first = _first_line(content)
        return [n for n, taken in self.files.items() if taken.size > len(content) and taken.first == first]

    def forget_gone(self, there: Collection[str], most: int) -> None:
        """Keep only the last `most` of the files that are not in the folder any more."""
        gone = [name for name in self.files if name not in there]
        for name in gone[: max(0, len(gone) - most)]:
            del self.files[name]


def taken_whole(content: bytes, rows: int, modified: int) -> Taken:
    """The entry of a file whose content was all taken."""
    return Taken(len(content), hashlib.sha256(content).hexdigest(), rows, modified, _first_line(content))


def _first_line(content: bytes) -> str:
    return hashlib.sha256(content[: content.find(b"\n") + 1]).hexdigest()
