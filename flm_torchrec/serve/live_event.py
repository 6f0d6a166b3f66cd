"""Live events: as requests bring them, as a row of a database, and as the log gives them out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

EVENT_COLUMNS = ("item", "event", "value", "timestamp", "export", "context")
"""Columns of a live event in a database, in the order of `event_row`."""


@dataclass(frozen=True)
class LiveEvent:
    """One event by keys and names, which stay valid when another export is loaded."""

    item: str
    event: str
    value: float
    timestamp: int
    export: str
    """`LoadedExport.rows` of the export served when the event came."""
    context: Mapping[str, str] = field(default_factory=dict)
    """By feature of events, the value, also one that the export did not know."""


class LoggedEvent(NamedTuple):
    """An event of the log of a store."""

    number: int
    user: str
    item: str
    timestamp: int
    event: str
    value: float
    context: Mapping[str, str]


def event_row(event: LiveEvent) -> list[Any]:
    """A live event as a row of a database: EVENT_COLUMNS."""
    context = json.dumps(dict(event.context), ensure_ascii=True)  # PostgreSQL's text has no NUL
    return [event.item, event.event, event.value, event.timestamp, event.export, context]


def event_of(row: Sequence[Any]) -> LiveEvent:
    """The live event of a row."""
    item, event, value, timestamp, export, context = row
    return LiveEvent(item, event, value, timestamp, export, parsed_context(context))


def logged_event(row: Sequence[Any]) -> LoggedEvent:
    """The logged event of a row: the fields of `LoggedEvent`, the context as text."""
    number, user, item, timestamp, event, value, context = row
    return LoggedEvent(number, user, item, timestamp, event, value, parsed_context(context))


def parsed_context(text: str) -> Mapping[str, str]:
    """The context in a row."""
    found: dict[str, str] = json.loads(text) if text != "{}" else {}
    return found
