"""Requests → answers, from one loaded export at a time. A swap to another does not change running requests."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from flm_torchrec.data.history import NO_EVENTS, Events
from flm_torchrec.errors import DataError, RunError
from flm_torchrec.export.tower.reader import Represented, TowerQuery
from flm_torchrec.names import nearest_key
from flm_torchrec.serve.catalogue import TOP_VALUES
from flm_torchrec.serve.explain import explain
from flm_torchrec.serve.live import LiveEvent, LiveEvents
from flm_torchrec.serve.loaded_export import AddedItem, AddedItems, LoadedExport, load_export
from flm_torchrec.serve.messages import Event, NewEvent, NewItem, Recommend
from flm_torchrec.serve.resolve import Refused, check_filter, content_of, event_code, item_row

DAY = 86_400
"""Seconds that a client's clock may be ahead. After an event far in the future, no later event would be in order."""


@dataclass(frozen=True)
class MemoryLimits:
    """Limits of what is kept in memory."""

    added_items: int = 10_000
    live_users: int = 100_000


@dataclass(frozen=True)
class ResolvedRequest:
    """A request with rows and codes of the loaded export in place of keys and names."""

    query: TowerQuery
    head: int
    k: int
    excluded: np.ndarray  # rows
    left_out: list[str]


class Service:
    """Answers from the export that was loaded last. Safe to call from several threads.

    Raises:
        RunError: the export cannot be served.
    """

    def __init__(self, export: Path, limits: MemoryLimits = MemoryLimits()) -> None:
        self.export = export
        self.exports = export.resolve().parent
        self.limits = limits
        self.loaded = load_export(export, 1)
        self.live = LiveEvents(limits.live_users, self.loaded.tower.max_history + 1)
        self.changing = threading.Lock()
        self.swapping = threading.Lock()

    def health(self) -> dict[str, Any]:
        """Answer of `GET /health`: which export is served, and its size."""
        loaded = self.loaded
        return {
            "status": "ok",
            "model_version": loaded.manifest.model_version,
            "users": loaded.manifest.users,
            "items": loaded.size,
            "generation": loaded.number,
        }

    def vocabulary(self) -> dict[str, Any]:
        """Answer of `GET /v1/catalogue`: heads, features with their values, and kinds of events."""
        loaded = self.loaded
        return {
            "heads": list(loaded.manifest.heads),
            "features": {name: a.top(TOP_VALUES) for name, a in loaded.catalogue.attributes.items()},
            "events": loaded.tower.events,
            "max_history": loaded.tower.max_history,
            "model_version": loaded.manifest.model_version,
        }

    def find_items(self, text: str, limit: int) -> list[dict[str, Any]]:
        """Items whose title or key contains the text, added items first."""
        loaded = self.loaded
        rows = loaded.catalogue.search(text, limit)
        names = ((i.title + "\0" + i.key).lower() for i in loaded.added.items)
        added = [len(loaded.catalogue) + position for position, name in enumerate(names) if text.lower() in name]
        return [_item(loaded, row) for row in [*added, *rows][:limit]]

    def find_users(self, text: str, limit: int) -> list[str]:
        """Keys of known users that start with the text, then those that contain it; the first ones without text."""
        keys = self.loaded.user_of
        begins = (key for key in keys if key.startswith(text))
        holds = (key for key in keys if text in key and not key.startswith(text))
        return list(islice(chain(begins, holds), limit))

    def events_of(self, user: str) -> list[dict[str, Any]]:
        """The last events of a user, exported and live, oldest first.

        Raises:
            Refused: the user is neither in the export nor has events in memory.
        """
        loaded = self.loaded
        self._user(loaded, user)
        history, _ = self._events_and_seen(loaded, user)
        timed = loaded.tower.timestamps
        return [
            {**_item(loaded, int(row)), "event": loaded.tower.events[code], "timestamp": int(at) if timed else None}
            for row, code, at in zip(history.item, history.event, history.timestamp, strict=True)
        ]

    def recommend(self, requests: Sequence[Recommend]) -> list[dict[str, Any] | Refused]:
        """An answer for each request, or why it is refused; all from one loaded export and one run of the tower.

        Requests with unknown users, items, events, features or values are refused.
        """
        loaded = self.loaded
        asked: list[ResolvedRequest | Refused] = []
        for request in requests:
            try:
                asked.append(self._asked(loaded, request))
            except Refused as refused:
                asked.append(refused)
        queries = [a.query for a in asked if isinstance(a, ResolvedRequest)]
        found = iter(loaded.represent(queries) if queries else [])
        return [
            a if isinstance(a, Refused) else self._answer(loaded, request, a, next(found))
            for request, a in zip(requests, asked, strict=True)
        ]

    def add_item(self, item: NewItem) -> dict[str, Any]:
        """Add a cold item beside the catalogue, in place of an earlier added one with its key.

        Raises:
            Refused: the catalogue has the item, too many have been added, or a feature does not fit.
        """
        with self.changing:
            loaded = self.loaded
            if item.item in loaded.catalogue.row_of:
                raise Refused(409, f"item '{item.item}': is in the catalogue; only new items can be added")
            if item.item not in loaded.added.row_of and len(loaded.added.items) >= self.limits.added_items:
                raise Refused(409, f"{self.limits.added_items} items have been added, which is the most; export anew")
            fresh = AddedItem(item.item, item.title or item.item, item.features, _attributes(loaded, item.features))
            added, left_out = _with_items(loaded, loaded.added, [fresh])
            self.loaded = replace(loaded, added=added)
            size = self.loaded.size
        version = loaded.manifest.model_version
        return {"item": item.item, "model_version": version, "items": size, "left_out": left_out}

    def add_event(self, event: NewEvent) -> dict[str, Any]:
        """Add an event of a user; the user's next answer depends on it.

        Raises:
            Refused: the item or the kind of event is unknown, or the time is before the user's last event or in the
                future.
        """
        loaded = self.loaded
        item_row(loaded, event.item, "item")
        event_code(loaded, event.event, "event")
        history, _ = self._events_and_seen(loaded, event.user)
        last = int(history.timestamp[-1]) if len(history) else 0
        current = int(time.time()) if loaded.tower.timestamps else last + 1
        timestamp = max(last, current) if event.timestamp is None else event.timestamp
        if timestamp < last:
            raise Refused(422, f"timestamp: {timestamp} is before the user's last event, {last}; events come in order")
        if loaded.tower.timestamps and timestamp > max(last, current) + DAY:
            raise Refused(422, f"timestamp: {timestamp} is in the future, it is {current}; give seconds since 1970")
        value = 1.0 if event.value is None else event.value
        kept = self.live.add(event.user, LiveEvent(event.item, event.event, value, timestamp, loaded.number))
        version, known = loaded.manifest.model_version, event.user in loaded.user_of
        return {"user": event.user, "known": known, "live_events": kept, "model_version": version}

    def swap(self, export: Path) -> dict[str, Any]:
        """Load another export beside the one served, then serve it. The old one is freed after its last request.

        Raises:
            Refused: the export is in another folder than the first one, or cannot be served. The old one stays.
        """
        try:
            target = export.resolve()
        except (OSError, ValueError) as error:
            raise Refused(422, f"export: {error}") from error
        if not target.is_relative_to(self.exports):
            raise Refused(403, f"export: '{export}' is not in {self.exports}, the only place exports are taken from")
        if not self.swapping.acquire(blocking=False):
            raise Refused(409, "export: another one is being loaded; try again when it is served")
        try:
            fresh = load_export(target, self.loaded.number + 1)
            with self.changing:
                self.loaded = replace(fresh, added=_still_new(fresh, self.loaded.added.items))
        except (RunError, OSError) as error:
            raise Refused(422, f"export: {error}") from error
        finally:
            self.swapping.release()
        return self.health()

    def _asked(self, loaded: LoadedExport, request: Recommend) -> ResolvedRequest:
        history, seen, user = NO_EVENTS, NO_EVENTS.item, -1
        if request.user is not None:
            user = self._user(loaded, request.user)
            history, seen = self._events_and_seen(loaded, request.user)
        history = history + self._history(loaded, request.history, int(history.timestamp[-1]) if len(history) else None)
        profile: np.ndarray | None = None
        left_out: list[str] = []
        if request.features is not None:
            profile, left_out = content_of(loaded, "user", request.features)
        check_filter(loaded, request.filter)
        excluded = np.unique(np.concatenate([seen, history.item])) if request.exclude_seen else NO_EVENTS.item
        head = loaded.manifest.heads.index(request.head)
        return ResolvedRequest(TowerQuery(history, user, profile), head, request.k, excluded, left_out)

    def _answer(
        self, loaded: LoadedExport, request: Recommend, asked: ResolvedRequest, found: Represented
    ) -> dict[str, Any]:
        best = loaded.best(found.heads[asked.head], asked.k, asked.excluded, request.filter)
        items = [{**_item(loaded, row), "score": score} for row, score in best]
        if request.explain:
            reasons = explain(loaded, found, asked.query.history.item, np.array([row for row, _ in best], np.int64))
            items = [{**item, "why": why} for item, why in zip(items, reasons, strict=True)]
        answer = {"model_version": loaded.manifest.model_version, "head": request.head, "items": items}
        if asked.left_out:
            answer["left_out"] = asked.left_out
        return answer

    def _user(self, loaded: LoadedExport, user: str) -> int:
        """Row of a user of the export; -1 of a user with events in memory alone."""
        row = loaded.user_of.get(user, -1)
        if row < 0 and self.live.of(user) is None:
            raise Refused(404, f"user '{user}': not known; {nearest_key(user, loaded.user_of)}")
        return row

    def _events_and_seen(self, loaded: LoadedExport, user: str) -> tuple[Events, np.ndarray]:
        """The user's last events, exported and live, and rows [n] of all items seen."""
        row = loaded.user_of.get(user)
        history, seen = NO_EVENTS, NO_EVENTS.item
        if row is not None:
            history, seen = loaded.tower.known_history(row), loaded.seen[row].values.to_numpy().astype(np.int64)
        last = int(history.timestamp[-1]) if len(history) else -1
        # A newer export may have some of the live events already.
        live = [e for e in self.live.of(user) or () if e.export_number == loaded.number or e.timestamp > last]
        known = [(r, e) for r, e in ((loaded.row(e.item), e) for e in live) if r is not None]
        codes = {name: code for code, name in enumerate(loaded.tower.events)}
        later = Events(
            item=np.array([r for r, _ in known], np.int64),
            timestamp=np.array([e.timestamp for _, e in known], np.int64),
            event=np.array([codes.get(e.event or "", 0) for _, e in known], np.int64),
            value=np.array([e.value for _, e in known], np.float32),
        )
        return history + later, np.concatenate([seen, later.item])

    def _history(self, loaded: LoadedExport, events: Sequence[Event], last: int | None) -> Events:
        """Rows, codes and times of a request's history, which follows an event at the time `last`."""
        gap = loaded.tower.usual_gap if loaded.tower.timestamps else 1
        times: list[int] = []
        for position, event in enumerate(events):
            before = times[-1] if times else last
            given = event.timestamp if event.timestamp is not None else (before + gap if before is not None else 0)
            if before is not None and given < before:
                where = f"history.{position}.timestamp"
                raise Refused(422, f"{where}: {given} is before the event before it, {before}; order them by time")
            times.append(given)
        return Events(
            item=np.array([item_row(loaded, e.item, f"history.{n}.item") for n, e in enumerate(events)], np.int64),
            timestamp=np.array(times, np.int64),
            event=np.array([event_code(loaded, e.event, f"history.{n}.event") for n, e in enumerate(events)], np.int64),
            value=np.array([1.0 if e.value is None else e.value for e in events], np.float32),
        )


def _item(loaded: LoadedExport, row: int) -> dict[str, Any]:
    return {"item": loaded.key(row), "title": loaded.title(row), "attributes": loaded.attributes(row)}


def _attributes(loaded: LoadedExport, features: Mapping[str, Any]) -> dict[str, list[str]]:
    """The attributes of a cold item by its features, for filters and for people, of the features in the catalogue.

    Raises:
        Refused: a value does not fit its kind.
    """
    kinds = {f.name: f for f in loaded.tower.features if f.entity == "item"}
    try:
        return {name: kinds[name].shown(features.get(name)) for name in loaded.catalogue.attributes}
    except DataError as error:
        raise Refused(422, str(error)) from error


def _with_items(loaded: LoadedExport, added: AddedItems, items: Iterable[AddedItem]) -> tuple[AddedItems, list[str]]:
    """`added` with these items, each in place of one with its key; and the values of features that were left out."""
    by_key = {item.key: (item, content) for item, content in zip(added.items, added.contents, strict=True)}
    left_out: list[str] = []
    for item in items:
        content, unknown = content_of(loaded, "item", item.features)
        by_key[item.key] = item, content
        left_out += unknown
    contents = np.array([content for _, content in by_key.values()], np.float32).reshape(-1, loaded.tower.dim)
    rows = {key: len(loaded.catalogue) + position for position, key in enumerate(by_key)}
    return AddedItems(tuple(i for i, _ in by_key.values()), contents, loaded.tower.scored(contents), rows), left_out


def _still_new(fresh: LoadedExport, items: Iterable[AddedItem]) -> AddedItems:
    """The added items that a new export does not have and whose features fit it, with their attributes there."""
    return _with_items(fresh, fresh.added, [i for item in items for i in _fitted(fresh, item)])[0]


def _fitted(fresh: LoadedExport, item: AddedItem) -> list[AddedItem]:
    """[the item with its attributes in the new export]; empty where that has the item, or a feature no longer fits."""
    if item.key in fresh.catalogue.row_of:
        return []
    try:
        content_of(fresh, "item", item.features)
        return [replace(item, attributes=_attributes(fresh, item.features))]
    except Refused:
        return []  # other features are no reason to keep serving the older model
