"""Live events and cold items in a PostgreSQL database, which servers on several machines share.

It keeps what `EventStore` keeps, in the same order and within the same limits. Writers take turns by an advisory lock.
So events are numbered in the order in which they become visible, and a reader of the log misses none.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from flm_torchrec.errors import RunError
from flm_torchrec.safe_text import first_line, redact_address
from flm_torchrec.serve.event_store import DAY, PATIENCE, StoredItem, StoreError, StoreLimits
from flm_torchrec.serve.live_event import EVENT_COLUMNS, LiveEvent, LoggedEvent, event_of, event_row, logged_event

FORMAT = 1
SETTINGS = {
    "connect_timeout": int(PATIENCE),
    "tcp_user_timeout": int(1000 * PATIENCE),  # a machine that is gone does not answer at all
    "options": f"-c lock_timeout={int(1000 * PATIENCE)} -c synchronous_commit=on",
    "application_name": "flm serve",
}
SCHEMA = """
CREATE TABLE flm_live_store (id text NOT NULL, format integer NOT NULL, users bigint NOT NULL);
CREATE TABLE flm_live_events (
    seq bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, user_key text NOT NULL, item text NOT NULL,
    event text NOT NULL, value double precision NOT NULL, timestamp bigint NOT NULL, export text NOT NULL,
    received bigint NOT NULL
);
CREATE INDEX ON flm_live_events (user_key, seq);
CREATE TABLE flm_live_users (user_key text PRIMARY KEY, last bigint NOT NULL);
CREATE INDEX ON flm_live_users (last);
CREATE TABLE flm_live_items (
    seq bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, item text NOT NULL UNIQUE, title text NOT NULL,
    features text NOT NULL
);
"""
"""`flm_live_users.last` is the number of the user's newest event; `flm_live_store.users` counts the rows."""
HAS_CONTEXT = "SELECT 1 FROM pg_attribute WHERE attrelid = 'flm_live_events'::regclass AND attname = 'context'"
CONTEXT = "ALTER TABLE flm_live_events ADD COLUMN context text NOT NULL DEFAULT '{}'"
"""Adds the column that stores of older versions lack; these versions go on with a store that has it."""
LOCK = "SELECT pg_advisory_xact_lock('flm_live_events'::regclass::oid::bigint)"
MAKING = 0x464C4D53
"""Number of the advisory lock under which the tables are made."""


class PostgresStore:
    """As `EventStore`. Reads go over one connection, writes over another; one that broke is opened again.

    Args:
        address: of the database, as libpq takes it: postgresql://USER@HOST/DATABASE. Tables that are not there are made
            in the first schema of its search path.

    Raises:
        RunError: the client is not installed, or the database cannot be used.
    """

    def __init__(self, address: str, limits: StoreLimits) -> None:
        self.address = address
        self.limits = limits
        try:
            import psycopg
            from psycopg.conninfo import conninfo_to_dict
        except ModuleNotFoundError as error:
            raise RunError("--events postgresql: needs psycopg; pip install 'flm_torchrec[postgresql]'") from error
        self.client, self.parsed = psycopg, conninfo_to_dict
        self.writes, self.reads = threading.RLock(), threading.RLock()
        try:
            self.writer, self.reader = self._connected(), self._connected()
            self._make_tables()
        except psycopg.Error as error:
            reason = first_line(error, address)
            raise RunError(f"--events {redact_address(address)}: {reason}; give a database that is there") from error

    def close(self) -> None:
        """As of `EventStore`."""
        with self.writes, self.reads:
            self.writer.close()
            self.reader.close()

    @contextmanager
    def writing(self) -> Iterator[PostgresTransaction]:
        """As of `EventStore`."""
        with self.writes, self._telling():
            if self.writer.broken:
                self.writer = self._connected()
            complete = False
            try:
                with self.writer.transaction():
                    self.writer.execute(LOCK)
                    transaction = PostgresTransaction(self.writer)
                    yield transaction
                    transaction.drop(self.limits)
                    complete = True
            except self.client.Error as error:
                if not complete:
                    raise
                reason = first_line(error, self.address)
                raise StoreError(f"events: not known whether they were taken ({reason}); look, or try again") from error

    def events_of(self, user: str, most: int) -> tuple[LiveEvent, ...]:
        """As of `EventStore`."""
        with self._reading() as connection:
            return _events_of(connection, user, most)

    def forget(self, users: Sequence[str]) -> dict[str, int]:
        """As of `EventStore`; the database's own log and its backups may still have them."""
        with self.writing() as transaction:
            counts = {user: transaction.forget(user) for user in dict.fromkeys(users) if "\0" not in user}
        with self.writes, self._telling():
            self.writer.execute("VACUUM flm_live_events, flm_live_users")
        return {user: count for user, count in counts.items() if count}

    def counts(self, users: Sequence[str]) -> dict[str, int]:
        """As of `EventStore`."""
        query = "SELECT user_key, count(*) FROM flm_live_events WHERE user_key = ANY(%s) GROUP BY user_key"
        with self._reading() as connection:
            found = dict(connection.execute(query, [[user for user in users if "\0" not in user]]).fetchall())
        return {user: found[user] for user in dict.fromkeys(users) if user in found}

    def users(self) -> int:
        """As of `EventStore`."""
        with self._reading() as connection:
            return int(connection.execute("SELECT users FROM flm_live_store").fetchone()[0])

    def items_after(self, seq: int) -> list[StoredItem]:
        """As of `EventStore`."""
        query = "SELECT seq, item, title, features FROM flm_live_items WHERE seq > %s ORDER BY seq"
        with self._reading() as connection:
            rows = connection.execute(query, [seq]).fetchall()
        return [StoredItem(n, item, title, json.loads(features)) for n, item, title, features in rows]

    def log(self, after: int, most: int) -> list[LoggedEvent]:
        """As of `EventStore`."""
        columns = "seq, user_key, item, timestamp, event, value, context"
        with self._reading() as connection:
            query = f"SELECT {columns} FROM flm_live_events WHERE seq > %s ORDER BY seq LIMIT %s"
            rows = connection.execute(query, [after, most]).fetchall()
        return [logged_event(row) for row in rows]

    def identity(self) -> str:
        """As of `EventStore`."""
        with self._reading() as connection:
            return str(connection.execute("SELECT id FROM flm_live_store").fetchone()[0])

    @contextmanager
    def _reading(self) -> Iterator[Any]:
        with self.reads, self._telling():
            if self.reader.broken:
                self.reader = self._connected()
            yield self.reader

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except self.client.Error as error:
            reason = first_line(error, self.address)
            raise StoreError(
                f"events: the store cannot be used now ({reason}); nothing was taken, try again"
            ) from error

    def _connected(self) -> Any:
        given = self.parsed(self.address)
        options = f"{SETTINGS['options']} {given.pop('options', None) or ''}"
        wanted: dict[str, Any] = {**SETTINGS, **given, "options": options}
        return self.client.connect(**wanted, autocommit=True)

    def _make_tables(self) -> None:
        with self.writer.transaction():
            self.writer.execute("SELECT pg_advisory_xact_lock(%s)", [MAKING])  # of several processes, one makes them
            if self.writer.execute("SELECT to_regclass('flm_live_store')").fetchone()[0] is None:
                self.writer.execute(SCHEMA)
                self.writer.execute("INSERT INTO flm_live_store VALUES (%s, %s, 0)", [secrets.token_hex(4), FORMAT])
        (version,) = self.writer.execute("SELECT format FROM flm_live_store").fetchone()
        if version != FORMAT:
            where = redact_address(self.address)
            raise RunError(f"--events {where}: a store of format {version}, this version has {FORMAT}; give another")
        with self.writer.transaction():
            self.writer.execute("SELECT pg_advisory_xact_lock(%s)", [MAKING])
            if self.writer.execute(HAS_CONTEXT).fetchone() is None:
                self.writer.execute(CONTEXT)


class PostgresTransaction:
    """As `Transaction`."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection
        self.fresh = 0
        """Users who came, less those who went."""

    def events_of(self, user: str, most: int) -> tuple[LiveEvent, ...]:
        """As of `EventStore`."""
        return _events_of(self.connection, user, most)

    def add_event(self, user: str, event: LiveEvent) -> None:
        """As of `Transaction`."""
        names = ("user_key", *EVENT_COLUMNS, "received")
        row = [user, *event_row(event), int(time.time())]
        values = ", ".join(["%s"] * len(row))
        insert = f"INSERT INTO flm_live_events ({', '.join(names)}) VALUES ({values}) RETURNING seq"
        (seq,) = self.connection.execute(insert, row).fetchone()
        upsert = "INSERT INTO flm_live_users VALUES (%s, %s) ON CONFLICT (user_key) DO UPDATE SET last = excluded.last"
        (came,) = self.connection.execute(f"{upsert} RETURNING xmax = 0", [user, seq]).fetchone()  # 0: a new row
        self.fresh += came

    def add_item(self, key: str, title: str, features: Mapping[str, Any]) -> int:
        """As of `Transaction`."""
        self.connection.execute("DELETE FROM flm_live_items WHERE item = %s", [key])
        insert = "INSERT INTO flm_live_items (item, title, features) VALUES (%s, %s, %s) RETURNING seq"
        return int(self.connection.execute(insert, [key, title, json.dumps(features)]).fetchone()[0])

    def forget(self, user: str) -> int:
        """As of `Transaction`."""
        self._drop_users("user_key = %s", [user])
        return int(self.connection.execute("DELETE FROM flm_live_events WHERE user_key = %s", [user]).rowcount)

    def drop(self, limits: StoreLimits) -> None:
        """As of `Transaction`."""
        (users,) = self.connection.execute("SELECT users FROM flm_live_store").fetchone()
        silent = "SELECT user_key FROM flm_live_users ORDER BY last LIMIT %s"
        for (user,) in self.connection.execute(silent, [max(0, users + self.fresh - limits.live_users)]).fetchall():
            self.forget(user)
        first, last = self.connection.execute("SELECT min(seq), max(seq) FROM flm_live_events").fetchone()
        if first is not None:
            kept = max(last - limits.events + 1, self._first_since(int(time.time() - limits.days * DAY), last + 1))
            if kept > first:
                self.connection.execute("DELETE FROM flm_live_events WHERE seq < %s", [kept])
                self._drop_users("last < %s", [kept])
        excess = "SELECT seq FROM flm_live_items ORDER BY seq DESC OFFSET %s"
        self.connection.execute(f"DELETE FROM flm_live_items WHERE seq IN ({excess})", [2 * limits.added_items])
        if self.fresh:
            self.connection.execute("UPDATE flm_live_store SET users = users + %s", [self.fresh])

    def _drop_users(self, which: str, values: list[Any]) -> None:
        self.fresh -= self.connection.execute(f"DELETE FROM flm_live_users WHERE {which}", values).rowcount

    def _first_since(self, moment: int, otherwise: int) -> int:
        """As of `Transaction`."""
        query = "SELECT seq FROM flm_live_events WHERE received >= %s ORDER BY seq LIMIT 1"
        found = self.connection.execute(query, [moment]).fetchone()
        return int(found[0]) if found else otherwise


def _events_of(connection: Any, user: str, most: int) -> tuple[LiveEvent, ...]:
    if "\0" in user:  # which PostgreSQL's text cannot have, so nobody has it
        return ()
    columns = ", ".join(EVENT_COLUMNS)
    query = f"SELECT {columns} FROM flm_live_events WHERE user_key = %s ORDER BY seq DESC LIMIT %s"
    return tuple(event_of(row) for row in reversed(connection.execute(query, [user, most]).fetchall()))
