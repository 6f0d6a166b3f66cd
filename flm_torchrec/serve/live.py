"""What users did since the export: kept in memory, for as many users as fit."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass


@dataclass(frozen=True)
class LiveEvent:
    """One event by keys and names, which outlive the generation it came in."""

    item: str
    event: str | None
    value: float
    timestamp: int
    generation: int
    """Its number."""


class LiveEvents:
    """The last events of the users heard of last.

    Args:
        users: most users; the one silent for longest is forgotten.
        events: most events of a user; the oldest is forgotten.
    """

    def __init__(self, users: int, events: int) -> None:
        self.users = users
        self.events = events
        self.held: OrderedDict[str, tuple[LiveEvent, ...]] = OrderedDict()
        self.lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.held)

    def of(self, user: str) -> tuple[LiveEvent, ...] | None:
        """Oldest first; None of a user not heard of."""
        return self.held.get(user)

    def add(self, user: str, event: LiveEvent) -> int:
        """How many are kept of the user now."""
        with self.lock:
            kept = (*self.held.pop(user, ()), event)[-self.events :]
            self.held[user] = kept
            if len(self.held) > self.users:
                self.held.popitem(last=False)
            return len(kept)
