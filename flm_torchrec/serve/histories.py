"""Events of users → histories of rows, codes and times: exported events, live ones, and those of a request."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flm_torchrec.data.history import NO_CONTEXT, NO_EVENTS, Events
from flm_torchrec.serve.event_store import DAY
from flm_torchrec.serve.live_event import LiveEvent
from flm_torchrec.serve.loaded_export import LoadedExport
from flm_torchrec.serve.messages import Event, NewEvent
from flm_torchrec.serve.resolve import Refused, context_codes, event_code, item_row


def events_and_seen(loaded: LoadedExport, user: str, live: Sequence[LiveEvent]) -> tuple[Events, np.ndarray]:
    """The user's last events, exported and live, and rows [n] of all items that the user has had.

    Args:
        live: as many as may be known; the newest that the tower reads become part of the history.
    """
    row = loaded.user_of.get(user)
    history, seen = NO_EVENTS, NO_EVENTS.item
    if row is not None:
        history, seen = loaded.tower.known_history(row), loaded.seen[row].values.to_numpy().astype(np.int64)
    last = int(history.timestamp[-1]) if len(history) else -1
    # A newer export may have some of the live events already.
    same = (loaded.rows, *loaded.manifest.cleaned_of)
    later = [e for e in live if e.export in same or e.timestamp > last]
    known = [(r, e) for r, e in ((loaded.row(e.item), e) for e in later) if r is not None]
    codes = {name: code for code, name in enumerate(loaded.tower.events)}
    contexts = {f.name for f in loaded.tower.contexts}
    given = [{name: value for name, value in e.context.items() if name in contexts} for _, e in known]
    events = Events(
        item=np.array([r for r, _ in known], np.int64),
        timestamp=np.array([e.timestamp for _, e in known], np.int64),
        event=np.array([codes.get(e.event, 0) for _, e in known], np.int64),
        value=np.array([e.value for _, e in known], np.float32),
        context=_coded_contexts(loaded, given, "context", []),
    )
    newest = events.take(slice(-loaded.tower.max_history - 1, None))
    return history + newest, np.concatenate([seen, loaded.tower.had(events)])


def new_event(loaded: LoadedExport, event: NewEvent, live: Sequence[LiveEvent], left_out: list[str]) -> LiveEvent:
    """A posted event, checked against the events before it. It keeps all of its context: a newer export may know more.

    Args:
        live: the user's live events.
        left_out: gets one line for each value of the context that was not in training.

    Raises:
        Refused: the item, the kind of event or a feature of the context is unknown, or the time is before the user's
            last event or in the future.
    """
    item_row(loaded, event.item, "item")
    code = event_code(loaded, event.event, "event")
    context_codes(loaded, event.context, "context", left_out)
    history, _ = events_and_seen(loaded, event.user, live)
    last = int(history.timestamp[-1]) if len(history) else 0
    current = int(time.time()) if loaded.tower.timestamps else last + 1
    timestamp = max(last, current) if event.timestamp is None else event.timestamp
    if timestamp < last:
        raise Refused(422, f"timestamp: {timestamp} is before the user's last event, {last}; events come in order")
    if loaded.tower.timestamps and timestamp > max(last, current) + DAY:
        # A client's clock may be a day ahead. After an event far in the future, no later one would be in order.
        raise Refused(422, f"timestamp: {timestamp} is in the future, it is {current}; give seconds since 1970")
    value = 1.0 if event.value is None else event.value
    context = {name: str(given) for name, given in event.context.items() if given is not None}
    return LiveEvent(event.item, loaded.tower.events[code], value, timestamp, loaded.rows, context)


def asked_events(loaded: LoadedExport, events: Sequence[Event], last: int | None, left_out: list[str]) -> Events:
    """Rows, codes and times of a request's history, which follows an event at the time `last`.

    Args:
        left_out: gets one line for each value of a context that was not in training.

    Raises:
        Refused: an item, a kind of event or a feature of a context is unknown, or an event is before the one before it.
    """
    gap = loaded.tower.usual_gap if loaded.tower.timestamps else 1
    times: list[int] = []
    for position, event in enumerate(events):
        before = times[-1] if times else last
        given = event.timestamp if event.timestamp is not None else (before + gap if before is not None else 0)
        if before is not None and given < before:
            where = f"history.{position}.timestamp"
            raise Refused(422, f"{where}: {given} is before the event before it, {before}; order them by time")
        times.append(given)
    rows = [loaded.row(event.item) for event in events]
    if None in rows:
        unknown = rows.index(None)
        item_row(loaded, events[unknown].item, f"history.{unknown}.item")
    codes = [event.event and event_code(loaded, event.event, f"history.{n}.event") for n, event in enumerate(events)]
    return Events(
        item=np.array(rows, np.int64),
        timestamp=np.array(times, np.int64),
        event=np.array([code or 0 for code in codes], np.int64),
        value=np.array([1.0 if e.value is None else e.value for e in events], np.float32),
        context=_coded_contexts(loaded, [e.context for e in events], "history", left_out),
    )


def _coded_contexts(
    loaded: LoadedExport, contexts: Sequence[Mapping[str, Any]], where: str, left_out: list[str]
) -> np.ndarray:
    """[n] contexts by name and value → [n, C] int32 codes.

    Raises:
        Refused: there is no such feature, or a value does not fit.
    """
    if not loaded.tower.contexts and not any(contexts):
        return NO_CONTEXT
    codes = [context_codes(loaded, c, f"{where}.{n}.context", left_out) for n, c in enumerate(contexts)]
    return np.array(codes, np.int32).reshape(len(codes), len(loaded.tower.contexts))
