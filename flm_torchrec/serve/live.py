"""Events since the export, in memory, for a limited number of users."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass


@dataclass(frozen=True)
class LiveEvent:
    """One event by keys and names, which stay valid when another export is loaded."""

    item: str
    event: str | None
    value: float
    timestamp: int
    export_number: int
    """`LoadedExport.number` of the export served when the event came."""


class LiveEvents:
    """The last events of the users who were active last.

    Args:
        users: maximum of users; the one inactive for longest is dropped.
        events: maximum of events of a user; the oldest is dropped.
    """

    def __init__(self, users: int, events: int) -> None:
        self.users = users
        self.events = events
        self.by_user: OrderedDict[str, tuple[LiveEvent, ...]] = OrderedDict()
        self.lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.by_user)

    def of(self, user: str) -> tuple[LiveEvent, ...] | None:
        """The user's events, oldest first; None without any."""
        return self.by_user.get(user)

    def add(self, user: str, event: LiveEvent) -> int:
        """Add an event, and return how many events of the user are kept."""
        with self.lock:
            kept = (*self.by_user.pop(user, ()), event)[-self.events :]
            self.by_user[user] = kept
            if len(self.by_user) > self.users:
                self.by_user.popitem(last=False)
            return len(kept)
