"""Hints for an unknown name: the most similar known names."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from itertools import islice

COMPARED = 100_000
"""Maximum of known names that are compared with an unknown one. More would take seconds."""
COMPARED_WHILE_SERVING = 2000
"""The same for a server, which must answer within milliseconds."""
COMPARED_LETTERS = 200
"""Letters of the unknown name that are compared. More would take seconds too."""
LISTED = 20
"""Maximum of known names that a hint lists."""


def closest(name: str, known: Iterable[str], count: int = 1, cutoff: float = 0.5) -> list[str]:
    """The known names most similar to `name`, the most similar first; empty if none is similar."""
    return get_close_matches(str(name)[:COMPARED_LETTERS], list(islice(known, COMPARED)), n=count, cutoff=cutoff)


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint that names the closest known name, or lists the known ones."""
    known = list(islice(known, COMPARED))
    close = closest(name, known)
    if close:
        return f"did you mean '{close[0]}'?"
    more = f", and {len(known) - LISTED} more" if len(known) > LISTED else ""
    return f"known: {', '.join(known[:LISTED])}{more}" if known else "there are none"


def nearest_key(key: str, known: Iterable[str], compared: int = COMPARED_WHILE_SERVING) -> str:
    """A hint for the id of a user or item: the known id closest to it, else the first one as an example."""
    keys = list(islice(known, compared))
    close = closest(key, keys, cutoff=0.6) or keys[:1]
    return f"did you mean '{close[0]}'?" if close else "there are none"
