"""What a store of live events and cold items does, and which one an address names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from flm_torchrec.errors import RunError
from flm_torchrec.safe_text import redact_address
from flm_torchrec.serve.event_store import EventStore, StoredItem, StoreLimits
from flm_torchrec.serve.live_event import LiveEvent, LoggedEvent
from flm_torchrec.serve.postgres_store import PostgresStore
from flm_torchrec.serve.redis_store import RedisStore

POSTGRESQL = ("postgresql://", "postgres://")
REDIS = ("redis://", "rediss://")
SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
"""How an address begins that is no file."""


class LiveTransaction(Protocol):
    """As `event_store.Transaction`."""

    def events_of(self, user: str, most: int) -> tuple[LiveEvent, ...]:
        """The user's last events, oldest first."""
        ...

    def add_event(self, user: str, event: LiveEvent) -> None:
        """Add an event behind all others."""
        ...

    def add_item(self, key: str, title: str, features: Mapping[str, Any]) -> int:
        """Add a cold item, in place of an earlier one with its key; the number of the change."""
        ...


class LiveStore(Protocol):
    """As `EventStore`. Each method raises StoreError where the store cannot be used."""

    @property
    def limits(self) -> StoreLimits:
        """What is kept."""
        ...

    def close(self) -> None:
        """Close all connections."""
        ...

    def writing(self) -> AbstractContextManager[LiveTransaction]:
        """One transaction: all of it is kept at the end, or nothing of it."""
        ...

    def events_of(self, user: str, most: int) -> tuple[LiveEvent, ...]:
        """The user's last events, oldest first."""
        ...

    def forget(self, users: Sequence[str]) -> dict[str, int]:
        """Remove all events of users; the number of events of each user who had any."""
        ...

    def counts(self, users: Sequence[str]) -> dict[str, int]:
        """The number of events of each of the users who has any."""
        ...

    def users(self) -> int:
        """Number of users with events."""
        ...

    def items_after(self, seq: int) -> list[StoredItem]:
        """Cold items posted after change `seq`, in order."""
        ...

    def log(self, after: int, most: int) -> list[LoggedEvent]:
        """At most `most` events after number `after`, in order."""
        ...

    def identity(self) -> str:
        """Random digits that no other store has."""
        ...


def open_store(address: str | None, limits: StoreLimits | None = None) -> LiveStore:
    """The store at an address; None: one in memory.

    Args:
        address: a SQLite file, postgresql://USER@HOST/DATABASE, or redis://HOST:PORT/NUMBER.

    Raises:
        RunError: there is no such kind of store, or it cannot be used.
    """
    limits = limits or StoreLimits()
    if address is None:
        return EventStore(None, limits)
    if address.startswith(POSTGRESQL):
        return PostgresStore(address, limits)
    if address.startswith(REDIS):
        return RedisStore(address, limits)
    if SCHEME.match(address):
        raise RunError(
            f"--events {redact_address(address)}: no such kind of store; give a file (./NAME if its name has a colon),"
            " postgresql://USER@HOST/NAME, redis://HOST:PORT/NUMBER, or none: in memory, of 'flm serve' alone"
        )
    return EventStore(Path(address), limits)


def existing_store(address: str) -> LiveStore:
    """As `open_store`, but no file is made.

    Raises:
        RunError: there is no such store.
    """
    if "://" not in address and not Path(address).is_file():
        raise RunError(f"{address}: not found; --events must name the store of 'flm serve --events'")
    return open_store(address)
