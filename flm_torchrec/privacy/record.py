"""The record of what was forgotten: a file of JSON lines that only grows, each signed together with the one before.

A line has `n` (1, 2, …), `time`, `act` and its fields, `previous` (the signature of the line before) and `signature`,
an HMAC-SHA256 (RFC 2104) of all other fields. So a line that is altered, removed, added or moved is found. Lines that
are missing at the end are not: note the last signature elsewhere. Users are there by an HMAC of their keys.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flm_torchrec.claim import claim
from flm_torchrec.documents import Unreadable, parse_json, read_text
from flm_torchrec.errors import RunError
from flm_torchrec.files import sync, telling

MOST_BYTES = 2**30
INSTEAD = "give another --record"


@dataclass(frozen=True)
class RecordKey:
    """The secret of a record: it signs lines, and makes pseudonyms of users. Without it neither can be guessed."""

    secret: bytes

    def sign(self, line: dict[str, Any]) -> str:
        """The signature of a line, over all fields but this one."""
        fields = {name: value for name, value in line.items() if name != "signature"}
        return self._digest("line", json.dumps(fields, sort_keys=True, ensure_ascii=True))

    def pseudonym(self, user: str) -> str:
        """What stands for a user in the record."""
        return self._digest("user", user)

    def _digest(self, purpose: str, text: str) -> str:
        # A key of its own for each purpose: the secret may also be that of 'flm prepare --hash-users'.
        derived = hmac.new(self.secret, f"flm forget record: {purpose}".encode(), hashlib.sha256).digest()
        return hmac.new(derived, text.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()


def read_record(file: Path, key: RecordKey) -> list[dict[str, Any]]:
    """The lines of a record, each checked.

    Raises:
        RunError: the file cannot be read, or a line is not what was signed; the first such line is named.
    """
    try:
        text = read_text(file, MOST_BYTES)
    except Unreadable as error:
        raise RunError(f"{file}: not readable ({error}); give the --record of 'flm forget'") from error
    *whole, rest = text.split("\n")
    if rest:
        raise RunError(f"{file}: line {len(whole) + 1}: is not complete; restore the file from a copy")
    lines: list[dict[str, Any]] = []
    for number, written in enumerate(whole, 1):
        line = _parsed(written)
        previous = lines[-1]["signature"] if lines else ""
        if not hmac.compare_digest(key.sign(line).encode(), str(line.get("signature")).encode()):
            hint = " or signed with another key" if number == 1 else ""
            raise RunError(f"{file}: line {number}: was altered{hint}; restore the file from a copy")
        if line.get("n") != number or line.get("previous") != previous:
            raise RunError(f"{file}: line {number}: does not follow the line before; restore the file from a copy")
        lines.append(line)
    return lines


def _parsed(written: str) -> dict[str, Any]:
    """A line; empty where it is no JSON object, which no signature fits."""
    try:
        line = parse_json(written)
    except Unreadable:
        return {}
    return line if isinstance(line, dict) else {}


@dataclass
class Record:
    """A record that is open for new lines."""

    file: Path
    key: RecordKey
    lines: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    @contextmanager
    def opened(cls, file: Path, key: RecordKey) -> Iterator[Record]:
        """The record of a file, which is made if it is not there, while no other process writes it.

        A line that a killed process has not completed is cut off: nobody was told of it.

        Raises:
            RunError: as of `read_record`, or the file cannot be written.
        """
        with claim(file, INSTEAD), telling(file, INSTEAD):
            os.close(os.open(file, os.O_RDWR | os.O_CREAT, 0o600))
            content = file.read_bytes()
            if content and not content.endswith(b"\n"):
                os.truncate(file, content.rfind(b"\n") + 1)
            yield cls(file, key, read_record(file, key))

    def add(self, act: str, **fields: Any) -> None:
        """Append a line and wait until it is on the disk.

        Raises:
            RunError: it cannot be written.
        """
        previous = self.lines[-1]["signature"] if self.lines else ""
        moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        line = {"n": len(self.lines) + 1, "time": moment, "act": act, **fields, "previous": previous}
        line["signature"] = self.key.sign(line)
        with telling(self.file, INSTEAD):
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line, ensure_ascii=True) + "\n")
            sync(self.file)
        self.lines.append(line)


def unfinished(lines: Sequence[dict[str, Any]]) -> set[str]:
    """Pseudonyms of users whose forgetting has begun and not ended."""
    begun: set[str] = set()
    for line in lines:
        if line["act"] == "begin":
            begun |= set(line["users"])
        if line["act"] == "end":
            begun -= set(line["users"])
    return begun


@dataclass(frozen=True)
class Removal:
    """What was removed from one place."""

    place: str
    kind: str
    """data, run, export, events, store or server."""
    counts: Mapping[str, int]
    line: str
    """The same in words."""


class Log:
    """The progress of forgetting as it happens, in a record and for people: begin, a line for each place, end.

    Args:
        record: None: nothing is recorded.
        tell: is called with each line for people.
    """

    def __init__(
        self, record: Record | None, keys: Sequence[str], tell: Callable[[str], None] = lambda line: None
    ) -> None:
        self.record = record
        self.tell = tell
        self.keys = keys
        self.users = [] if record is None else sorted(record.key.pseudonym(key) for key in keys)

    def begun(self) -> list[str]:
        """Users of the keys whose forgetting has begun earlier and not ended."""
        if self.record is None:
            return []
        waiting = unfinished(self.record.lines)
        return [key for key in self.keys if self.record.key.pseudonym(key) in waiting]

    def begin(self, places: Sequence[tuple[str, str, int]]) -> None:
        """All has been checked. `places`: name, kind, and how many of the users are there."""
        if self.record is not None:
            told = [{"place": place, "kind": kind, "users": users} for place, kind, users in places]
            self.record.add("begin", users=self.users, places=told)

    def removed(self, removal: Removal) -> None:
        """Users were removed from a place."""
        self.tell(f"{removal.place}: {removal.line}")
        if self.record is not None:
            self.record.add("removed", place=removal.place, kind=removal.kind, counts=dict(removal.counts))

    def end(self) -> None:
        """No place has the users any more."""
        if self.record is not None:
            self.record.add("end", users=self.users)
