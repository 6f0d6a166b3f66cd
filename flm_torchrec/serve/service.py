"""Requests → answers, from one loaded export at a time. A swap to another does not change running requests."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from flm_torchrec.data.history import NO_EVENTS, Events
from flm_torchrec.errors import RunError
from flm_torchrec.export.tower.reader import Represented, TowerQuery
from flm_torchrec.names import nearest_key
from flm_torchrec.safe_text import visible
from flm_torchrec.serve.catalogue import TOP_VALUES
from flm_torchrec.serve.cold_items import cold_item, with_fitting, with_items
from flm_torchrec.serve.event_store import EventStore
from flm_torchrec.serve.explain import explain
from flm_torchrec.serve.histories import asked_events, events_and_seen, new_event
from flm_torchrec.serve.loaded_export import AddedItem, LoadedExport, load_export
from flm_torchrec.serve.messages import Forget, NewEvent, NewItem, Recommend, Similar
from flm_torchrec.serve.ranking import alike, check_boost, ranked
from flm_torchrec.serve.resolve import Refused, check_filter, content_of, item_row
from flm_torchrec.serve.server_folder import NOT_SHARED, SharedExports


@dataclass(frozen=True)
class ResolvedRequest:
    """A request with rows and codes of the loaded export in place of keys and names."""

    query: TowerQuery
    head: str
    excluded: np.ndarray  # rows
    pinned: list[int]  # rows
    left_out: list[str]


class Service:
    """Answers from the export that was loaded last. Safe to call from several threads.

    Args:
        export: the first one to serve, or a link to it; others are taken from the same folder alone.
        store: of live events and cold items; None: one in memory.
        swapped: the export to serve in place of the first one.
        shared: where other processes of this server have the arrays of exports too.

    Raises:
        RunError: the export cannot be served.
    """

    def __init__(
        self,
        export: Path,
        store: EventStore | None = None,
        swapped: Path | None = None,
        shared: SharedExports = NOT_SHARED,
    ) -> None:
        self.export = export
        self.shared = shared
        self.exports = export.resolve().parent
        self.loaded = load_export(swapped or export, 1, shared)
        self.store = store or EventStore(None)
        self.items_seq = 0
        """Number of the last change of cold items in the store that `loaded` has."""
        self.changing = threading.Lock()
        self.swapping = threading.Lock()
        self.current()

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
        loaded = self.current()
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
            Refused: the user is neither in the export nor has live events.
        """
        loaded = self.current()
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
        loaded = self.current()
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

    def current(self) -> LoadedExport:
        """The loaded export, with the cold items that the store has of an earlier or of another process.

        Raises:
            StoreError: the store cannot be read.
        """
        if self.store.items_after(self.items_seq):
            with self.changing:
                fresh = self.store.items_after(self.items_seq)  # another thread may have taken them up meanwhile
                items = [AddedItem(i.key, i.title, i.features, {}) for i in fresh]
                self.loaded = with_fitting(self.loaded, items)
                self.items_seq = max([self.items_seq, *(i.seq for i in fresh)])
        return self.loaded

    def similar(self, request: Similar) -> dict[str, Any]:
        """Items like an item or near a vector, by the cosine of item vectors.

        Raises:
            Refused: there is no such item or value of a filter, or the vector does not fit.
        """
        loaded = self.current()
        items = [{**_item(loaded, row), "score": score} for row, score in alike(loaded, request)]
        return {"model_version": loaded.manifest.model_version, "items": items}

    def add_item(self, item: NewItem) -> dict[str, Any]:
        """Add a cold item beside the catalogue, in place of an earlier added one with its key.

        Raises:
            Refused: the catalogue has the item, too many have been added, or a feature does not fit.
            StoreError: it could not be stored.
        """
        self.current()
        with self.changing:
            loaded = self.loaded
            if item.item in loaded.catalogue.row_of:
                raise Refused(409, f"item '{item.item}': is in the catalogue; only new items can be added")
            if item.item not in loaded.added.row_of and len(loaded.added.items) >= self.store.limits.added_items:
                raise Refused(
                    409, f"{self.store.limits.added_items} items have been added, which is the most; export anew"
                )
            fresh = cold_item(loaded, item.item, item.title or item.item, item.features)
            added, left_out = with_items(loaded, [fresh])
            with self.store.writing() as transaction:
                seq = transaction.add_item(fresh.key, fresh.title, fresh.features)
            if seq == self.items_seq + 1:  # else another process has added items: taken up with the next request
                self.items_seq = seq
            self.loaded = replace(loaded, added=added)
            size = self.loaded.size
        version = loaded.manifest.model_version
        return {"item": item.item, "model_version": version, "items": size, "left_out": left_out}

    def add_events(self, events: Sequence[NewEvent]) -> list[dict[str, Any] | Refused]:
        """Add events of users, in one transaction; the users' next answers depend on them.

        An event whose item or kind is unknown, or that is not in order, is refused; the others are kept.

        Raises:
            StoreError: none of them could be stored.
        """
        loaded = self.current()
        most = loaded.tower.max_history + 1
        answers: list[dict[str, Any] | Refused] = []
        with self.store.writing() as transaction:
            for event in events:
                live = transaction.events_of(event.user, most)
                try:
                    transaction.add_event(event.user, new_event(loaded, event, live))
                except Refused as refused:
                    answers.append(refused)
                    continue
                known, kept = event.user in loaded.user_of, min(len(live) + 1, most)
                version = loaded.manifest.model_version
                answers.append({"user": event.user, "known": known, "live_events": kept, "model_version": version})
        return answers

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
            fresh = load_export(target, self.loaded.number + 1, self.shared)
            with self.changing:
                self.loaded = with_fitting(fresh, self.loaded.added.items)
        except (RunError, OSError) as error:
            raise Refused(422, f"export: {error}") from error
        finally:
            self.swapping.release()
        return self.health()

    def forget(self, request: Forget) -> dict[str, Any]:
        """Remove the live events of users, or only count them; and say which of the users the served export has.

        Raises:
            StoreError: the events could not be removed.
        """
        loaded = self.loaded
        live = self.store.counts(request.users) if request.check else self.store.forget(request.users)
        in_export = [user for user in dict.fromkeys(request.users) if user in loaded.user_of]
        return {"export": str(loaded.folder), "in_export": in_export, "live_events": live}

    def follow(self, export: Path) -> None:
        """Swap as another process did; what is wrong is printed, since nobody waits for an answer."""
        while True:
            try:
                self.swap(export)
                return
            except Refused as refused:
                if refused.status != 409:
                    print(f"not swapped: {visible(str(refused))}", flush=True)
                    return
                time.sleep(0.1)  # another one is being loaded

    def _asked(self, loaded: LoadedExport, request: Recommend) -> ResolvedRequest:
        history, seen, user = NO_EVENTS, NO_EVENTS.item, -1
        if request.user is not None:
            history, seen = self._events_and_seen(loaded, request.user)
            user = loaded.user_of.get(request.user, -1)
        last = int(history.timestamp[-1]) if len(history) else None
        history = history + asked_events(loaded, request.history, last)
        profile: np.ndarray | None = None
        left_out: list[str] = []
        if request.features is not None:
            profile, left_out = content_of(loaded, "user", request.features)
        check_filter(loaded, request.filter)
        check_boost(loaded, request.boost)
        pinned = [item_row(loaded, key, f"pinned.{n}") for n, key in enumerate(request.pinned)]
        excluded = np.unique(np.concatenate([seen, history.item])) if request.exclude_seen else NO_EVENTS.item
        return ResolvedRequest(TowerQuery(history, user, profile), request.head, excluded, pinned, left_out)

    def _answer(
        self, loaded: LoadedExport, request: Recommend, asked: ResolvedRequest, found: Represented
    ) -> dict[str, Any]:
        best = ranked(loaded, request, loaded.query(found, asked.head), asked.excluded, asked.pinned)
        items = [{**_item(loaded, row), "score": score} for row, score in best]
        if request.explain:
            reasons = explain(loaded, found, asked.query.history.item, np.array([row for row, _ in best], np.int64))
            items = [{**item, "why": why} for item, why in zip(items, reasons, strict=True)]
        answer = {"model_version": loaded.manifest.model_version, "head": request.head, "items": items}
        if asked.left_out:
            answer["left_out"] = asked.left_out
        return answer

    def _events_and_seen(self, loaded: LoadedExport, user: str) -> tuple[Events, np.ndarray]:
        """The user's last events, exported and live, and rows [n] of all items seen.

        Raises:
            Refused: the user is neither in the export nor has live events.
        """
        live = self.store.events_of(user, loaded.tower.max_history + 1)
        if not live and user not in loaded.user_of:
            raise Refused(404, f"user '{user}': not known; {nearest_key(user, loaded.user_of)}")
        return events_and_seen(loaded, user, live)


def _item(loaded: LoadedExport, row: int) -> dict[str, Any]:
    return {"item": loaded.key(row), "title": loaded.title(row), "attributes": loaded.attributes(row)}
