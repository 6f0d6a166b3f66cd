"""How many events users have: counted, so that it takes no memory for each user."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.99, 1.0)
"""Those of a report."""


@dataclass
class EventsPerUser:
    """Numbers of users by their number of events."""

    users: Counter[int] = field(default_factory=Counter)

    def add(self, events: np.ndarray) -> None:
        """Count users: [n] the events of each."""
        counts, users = np.unique(events, return_counts=True)
        self.users.update(dict(zip(counts.tolist(), users.tolist(), strict=True)))

    @property
    def events(self) -> int:
        """Of all users together."""
        return sum(events * users for events, users in self.users.items())

    def fewer_than(self, events: int) -> int:
        """Users with fewer events."""
        return sum(users for n, users in self.users.items() if n < events)

    def quantiles(self, shares: Iterable[float] = QUANTILES) -> dict[str, float]:
        """By share as a percentage, the events of the user nearest to that share of the way from least to most."""
        events = np.array(sorted(self.users))
        end = np.cumsum([self.users[n] for n in events.tolist()])  # number of users with at most so many events
        places = {f"{share:.0%}": int((end[-1] - 1) * share + 0.5) for share in shares}
        return {name: float(events[np.searchsorted(end, place, "right")]) for name, place in places.items()}
