"""What of a file has been taken already, told by content: a file that grew, changed, or came under another name."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Taken:
    """The part of a file that has been learnt from: its first `size` bytes."""

    size: int
    sha256: str
    rows: int
    modified: int = 0
    """Nanoseconds since 1970, as the file system had it: a file with this time and size is not read again."""


class Ledger:
    """What was taken of every file, by name, in the order in which it was taken."""

    def __init__(self, files: dict[str, Any]) -> None:
        self.files = {name: Taken(**entry) for name, entry in files.items()}

    def to_json(self) -> dict[str, Any]:
        return {name: asdict(taken) for name, taken in self.files.items()}

    def begins_with(self, content: bytes, there: Collection[str]) -> tuple[str, Taken] | None:
        """The longest beginning of the content that has been taken before, under whatever name.

        Args:
            there: files that are other than this one: of these the content counts as a whole alone. One that is not
                there any more may have been renamed, and have grown.
        """
        by_size: dict[int, dict[str, str]] = {}
        for name, taken in self.files.items():
            if taken.size < len(content) and name in there:
                continue
            by_size.setdefault(taken.size, {}).setdefault(taken.sha256, name)
        digest, done, found = hashlib.sha256(), 0, None
        for size in sorted(size for size in by_size if size <= len(content)):
            digest.update(memoryview(content)[done:size])
            done = size
            found = by_size[size].get(digest.hexdigest(), found)
        return None if found is None else (found, self.files[found])

    def forget_gone(self, there: Collection[str], most: int) -> None:
        """Keep no more than the last `most` of the files that are not there any more."""
        gone = [name for name in self.files if name not in there]
        for name in gone[: max(0, len(gone) - most)]:
            del self.files[name]


def taken_whole(content: bytes, rows: int, modified: int) -> Taken:
    """All of a content."""
    return Taken(len(content), hashlib.sha256(content).hexdigest(), rows, modified)
