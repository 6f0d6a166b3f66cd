"""Events since the export and cold items, in a SQLite file that several processes share and that outlives them.

A change is on the disk before it is acknowledged (write-ahead log, synchronous=FULL). One transaction takes many events
(group commit), since the disk takes as long for one as for a hundred.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flm_torchrec.errors import FlmError, RunError
from flm_torchrec.serve.live_event import EVENT_COLUMNS, LiveEvent, LoggedEvent, event_of, event_row, logged_event

APPLICATION = 0x464C4D53
"""`PRAGMA application_id` of a store: "FLMS"."""
FORMAT = 1
"""`PRAGMA user_version`."""
PATIENCE = 5.0
"""Seconds to wait for another process that writes."""
DAY = 86_400
SCHEMA = """
CREATE TABLE store (id TEXT NOT NULL, users INTEGER NOT NULL) STRICT;
CREATE TABLE events (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, user TEXT NOT NULL, item TEXT NOT NULL, event TEXT NOT NULL,
    value REAL NOT NULL, timestamp INTEGER NOT NULL, export TEXT NOT NULL, received INTEGER NOT NULL
) STRICT;
CREATE INDEX events_of_user ON events (user, seq);
CREATE TABLE users (user TEXT PRIMARY KEY, last INTEGER NOT NULL) STRICT, WITHOUT ROWID;
CREATE INDEX users_by_last ON users (last);
CREATE TRIGGER user_added AFTER INSERT ON users BEGIN UPDATE store SET users = users + 1; END;
CREATE TRIGGER user_dropped AFTER DELETE ON users BEGIN UPDATE store SET users = users - 1; END;
CREATE TABLE items (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, item TEXT NOT NULL UNIQUE, title TEXT NOT NULL, features TEXT NOT NULL
) STRICT;
"""
"""`users.last` is the number of the user's newest event; `store.users` counts the rows of `users`."""


CONTEXT = "ALTER TABLE events ADD COLUMN context TEXT NOT NULL DEFAULT '{}'"
"""Adds the column that stores of older versions lack; these versions go on with a store that has it."""


class StoreError(FlmError):
    """The store could not be read or written. Nothing of the change was kept."""


@dataclass(frozen=True)
class StoreLimits:
    """Limits of what is kept."""

    added_items: int = 10_000
    live_users: int = 100_000
    """Users with events; the one silent for longest is dropped with its events."""
    events: int = 10_000_000
    """Events of all users; the oldest are dropped."""
    days: float = 90.0
    """Days since an event came; older events are dropped."""


@dataclass(frozen=True)
class StoredItem:
    """A cold item as it was posted, with the number of the change."""

    seq: int
    key: str
    title: str
    """Empty: none was given."""
    features: Mapping[str, Any]


class EventStore:
    """Reads by one connection, writes by another, so that nobody who reads waits for the disk.

    Args:
        file: made if it is not there; None: in memory, of this process alone.

    Raises:
        RunError: the file cannot be written, or is something else.
    """

    def __init__(self, file: Path | None, limits: StoreLimits = StoreLimits()) -> None:
        self.file = file
        self.limits = limits
        try:
            self.writer = _opened(file)
            self.reader = self.writer if file is None else _opened(file)
        except (sqlite3.Error, OSError) as error:
            raise RunError(f"{file}: {_reason(error)}; give --events another file on a local disk") from error
        self.writes = threading.RLock()
        self.reads = self.writes if file is None else threading.RLock()

    def close(self) -> None:
        """Close both connections; later calls raise StoreError."""
        with self.writes, self.reads:
            self.writer.close()
            self.reader.close()

    @contextmanager
    def writing(self) -> Iterator[Transaction]:
        """One transaction: all of it is on the disk at the end, or, after any error, nothing of it.

        Raises:
            StoreError: it could not be written.
        """
        with self.writes, self._telling():
            self.writer.execute("BEGIN IMMEDIATE")
            try:
                transaction = Transaction(self.writer)
                yield transaction
                transaction.drop(self.limits)
                self.writer.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):  # the first error is the one to report
                    self.writer.execute("ROLLBACK")
                raise

    def events_of(self, user: str, most: int) -> tuple[LiveEvent, ...]:
        """The user's last events, oldest first."""
        with self.reads, self._telling():
            return events_of(self.reader, user, most)

    def forget(self, users: Sequence[str]) -> dict[str, int]:
        """Remove all events of users, also from the write-ahead log; the number of events of each user who had any.

        Raises:
            StoreError: they could not be removed, or a server is reading older pages, which have them still.
        """
        with self.writing() as transaction:
            counts = {user: transaction.forget(user) for user in dict.fromkeys(users)}
        with self.writes, self._telling():
            busy, *_ = self.writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if busy:
            raise StoreError(f"{self.file}-wal: is being read, so old pages stay in it; give the same command again")
        return {user: count for user, count in counts.items() if count}

    def counts(self, users: Sequence[str]) -> dict[str, int]:
        """The number of events of each of the users who has any."""
        query = "SELECT count(*) FROM events WHERE user = ?"
        with self.reads, self._telling():
            counts = {user: int(self.reader.execute(query, [user]).fetchone()[0]) for user in dict.fromkeys(users)}
        return {user: count for user, count in counts.items() if count}

    def users(self) -> int:
        """Number of users with events."""
        with self.reads, self._telling():
            return int(self.reader.execute("SELECT users FROM store").fetchone()[0])

    def items_after(self, seq: int) -> list[StoredItem]:
        """Cold items posted after change `seq`, in order."""
        with self.reads, self._telling():
            rows = self.reader.execute("SELECT seq, item, title, features FROM items WHERE seq > ? ORDER BY seq", [seq])
            return [StoredItem(n, item, title, json.loads(features)) for n, item, title, features in rows]

    def log(self, after: int, most: int) -> list[LoggedEvent]:
        """At most `most` events after number `after`, in order."""
        columns = "seq, user, item, timestamp, event, value, context"
        with self.reads, self._telling():
            query = f"SELECT {columns} FROM events WHERE seq > ? ORDER BY seq LIMIT ?"
            rows = self.reader.execute(query, [after, most]).fetchall()
        return [logged_event(row) for row in rows]

    def identity(self) -> str:
        """Random digits that no other store has."""
        with self.reads, self._telling():
            return str(self.reader.execute("SELECT id FROM store").fetchone()[0])

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise StoreError(f"events: the store cannot be used now ({error}); nothing was taken, try again") from error


class Transaction:
    """Changes that are kept together. It sees its own changes, and no other process changes anything meanwhile."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection

    def events_of(self, user: str, most: int) -> tuple[LiveEvent, ...]:
        """As of `EventStore`."""
        return events_of(self.connection, user, most)

    def add_event(self, user: str, event: LiveEvent) -> None:
        """Add an event behind all others."""
        names = ("user", *EVENT_COLUMNS, "received")
        row = [user, *event_row(event), int(time.time())]
        places = ", ".join("?" * len(row))
        done = self.connection.execute(f"INSERT INTO events ({', '.join(names)}) VALUES ({places})", row)
        last = "INSERT INTO users VALUES (?, ?) ON CONFLICT (user) DO UPDATE SET last = excluded.last"
        self.connection.execute(last, [user, done.lastrowid])

    def add_item(self, key: str, title: str, features: Mapping[str, Any]) -> int:
        """Add a cold item, in place of an earlier one with its key; the number of the change."""
        columns = "INSERT OR REPLACE INTO items (item, title, features) VALUES (?, ?, ?)"
        return int(self.connection.execute(columns, [key, title, json.dumps(features)]).lastrowid or 0)

    def forget(self, user: str) -> int:
        """Remove a user's events, and return how many there were."""
        self.connection.execute("DELETE FROM users WHERE user = ?", [user])
        return self.connection.execute("DELETE FROM events WHERE user = ?", [user]).rowcount

    def drop(self, limits: StoreLimits) -> None:
        """Drop what is beyond the limits: silent users, the oldest events, the oldest cold items."""
        (users,) = self.connection.execute("SELECT users FROM store").fetchone()
        silent = "SELECT user FROM users ORDER BY last LIMIT ?"
        for (user,) in self.connection.execute(silent, [max(0, users - limits.live_users)]).fetchall():
            self.forget(user)
        first, last = self.connection.execute("SELECT min(seq), max(seq) FROM events").fetchone()
        if first is not None:
            kept = max(last - limits.events + 1, self._first_since(int(time.time() - limits.days * DAY), last + 1))
            if kept > first:
                self.connection.execute("DELETE FROM events WHERE seq < ?", [kept])
                self.connection.execute("DELETE FROM users WHERE last < ?", [kept])
        excess = "DELETE FROM items WHERE seq IN (SELECT seq FROM items ORDER BY seq DESC LIMIT -1 OFFSET ?)"
        self.connection.execute(excess, [2 * limits.added_items])  # those that later exports have count too

    def _first_since(self, moment: int, otherwise: int) -> int:
        """Number of the first event that came at `moment` or later: events are numbered in the order they came."""
        query = "SELECT seq FROM events WHERE received >= ? ORDER BY seq LIMIT 1"
        found = self.connection.execute(query, [moment]).fetchone()
        return int(found[0]) if found else otherwise


def events_of(connection: sqlite3.Connection, user: str, most: int) -> tuple[LiveEvent, ...]:
    """The last `most` events of a user, oldest first."""
    query = f"SELECT {', '.join(EVENT_COLUMNS)} FROM events WHERE user = ? ORDER BY seq DESC LIMIT ?"
    return tuple(event_of(row) for row in reversed(connection.execute(query, [user, most]).fetchall()))


def _opened(file: Path | None) -> sqlite3.Connection:
    """A connection to a store; an empty file becomes one.

    Raises:
        sqlite3.Error, OSError: the file cannot be used.
        RunError: it is something else.
    """
    if file is not None:
        _make_file(file)
    connection = sqlite3.connect(file or ":memory:", PATIENCE, isolation_level=None, check_same_thread=False)
    connection.execute("BEGIN")  # between two reads, a process that starts at the same time might make its tables
    (application,), (tables,) = (
        connection.execute(query).fetchone()
        for query in ("SELECT application_id FROM pragma_application_id", "SELECT count(*) FROM sqlite_master")
    )
    connection.execute("COMMIT")
    if application != APPLICATION and (application or tables):
        raise RunError(f"{file}: is a database of another program; give --events another file")
    if file is not None and _write_ahead(connection) != "wal":
        raise RunError(f"{file}: its file system has no shared memory for a write-ahead log; give one on a local disk")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA secure_delete = ON")  # bytes of dropped events are overwritten
    _make_tables(connection)
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version != FORMAT:
        raise RunError(f"{file}: is a store of format {version}, this version has {FORMAT}; give another file")
    return connection


def _make_file(file: Path) -> None:
    """Make the file where it is not: what users did is for the owner alone. SQLite's own files get the same mode.

    A file that is there is not opened. Closing it would end all locks of this process on it (POSIX), also those of
    SQLite's connections; another process would then take itself for the last one and remove the write-ahead log.
    """
    if file.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(file))
    with suppress(FileExistsError):
        os.close(os.open(os.path.realpath(file), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))


def _write_ahead(connection: sqlite3.Connection) -> str:
    """The journal's mode after asking for a write-ahead log.

    SQLite does not wait by itself here: it reads first, and while it reads it waits for no lock, as two such would wait
    for each other.
    """
    end = time.monotonic() + PATIENCE
    while True:
        try:
            return str(connection.execute("PRAGMA journal_mode = WAL").fetchone()[0])
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                raise
        time.sleep(0.01)


def _make_tables(connection: sqlite3.Connection) -> None:
    connection.execute("BEGIN IMMEDIATE")  # of several processes that start at once, one makes the tables
    try:
        if not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            for statement in _statements(SCHEMA):
                connection.execute(statement)
            connection.execute("INSERT INTO store VALUES (?, 0)", [secrets.token_hex(4)])
            connection.execute(f"PRAGMA application_id = {APPLICATION}")
            connection.execute(f"PRAGMA user_version = {FORMAT}")
        columns = {name for _, name, *_ in connection.execute("PRAGMA table_info(events)")}
        if columns and "context" not in columns:
            connection.execute(CONTEXT)
        connection.execute("COMMIT")
    except sqlite3.Error:
        connection.execute("ROLLBACK")
        raise


def _statements(script: str) -> Iterator[str]:
    """The statements of a script one by one: `executescript` would commit before the first."""
    statement = ""
    for line in script.splitlines():
        statement += line + "\n"
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
