"""Requests → answers, from one loaded export at a time. A swap to another does not change running requests."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from flm_torchrec.export.tower.reader import Represented
from flm_torchrec.serve.answers import (
    Asked,
    asked_user,
    check_rules,
    item_of,
    known_events,
    recommended,
    similar_items,
    similar_users,
)
from flm_torchrec.serve.catalogue import TOP_VALUES
from flm_torchrec.serve.cold_items import cold_item, with_fitting, with_items
from flm_torchrec.serve.histories import new_event
from flm_torchrec.serve.live_store import LiveStore, open_store
from flm_torchrec.serve.loaded_export import UNSOUND, LoadedExport, load_export
from flm_torchrec.serve.messages import Forget, NewEvent, NewItem, Recommend, Similar, SimilarUsers
from flm_torchrec.serve.resolve import Refused
from flm_torchrec.serve.server_folder import NOT_SHARED, SharedExports
from flm_torchrec.serve.split import apart, export_name
from flm_torchrec.serve.swapping import LEAST_RECALL, Canary, CanaryTerms, Swaps
from flm_torchrec.serve.user_vectors import load_user_vectors


@dataclass(frozen=True)
class ServiceOptions:
    """What a service does beside recommending, and what it asks of exports."""

    similar_users: bool = False
    """Whether the vectors of the export's users are loaded, so that users alike can be found."""
    least_recall: float = LEAST_RECALL
    """Recall@100 that an export needs to be swapped in, see `measured_recall`."""
    shared: SharedExports = NOT_SHARED
    """Where other processes of this server have the arrays of exports too."""
    announce: Callable[[str, dict[str, Any]], None] = lambda name, state: None
    """Called with the service's name and `Swaps.state` when that has changed."""


class Service:
    """Answers from the export that was loaded last. Safe to call from several threads.

    Args:
        export: the first one to serve, or a link to it; others are taken from the same folder alone.
        store: of live events and cold items; None: one in memory.
        swapped: the export to serve in place of the first one.
        options: what else it does.

    Raises:
        RunError: the export cannot be served.
    """

    def __init__(
        self,
        export: Path,
        store: LiveStore | None = None,
        swapped: Path | None = None,
        options: ServiceOptions = ServiceOptions(),
    ) -> None:
        self.export = export
        self.exports = export.resolve().parent
        self.name = export_name(export)
        self.options = options
        self.loaded = self.load(swapped or export, 1)
        self.canary: Canary | None = None
        self.store = store or open_store(None)
        self.items_seq = 0
        """Number of the last change of cold items in the store that `loaded` has."""
        self.changing = threading.Lock()
        self.swaps = Swaps(self, options.least_recall, lambda state: options.announce(self.name, state))
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
            "contexts": {f.name: list(f.values[:TOP_VALUES]) for f in loaded.tower.contexts},
            "max_history": loaded.tower.max_history,
            "model_version": loaded.manifest.model_version,
        }

    def find_items(self, text: str, limit: int) -> list[dict[str, Any]]:
        """Items whose title or key contains the text, added items first."""
        loaded = self.current()
        rows = loaded.catalogue.search(text, limit)
        names = ((i.title + "\0" + i.key).lower() for i in loaded.added.items)
        added = [len(loaded.catalogue) + position for position, name in enumerate(names) if text.lower() in name]
        return [item_of(loaded, row) for row in [*added, *rows][:limit]]

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
        loaded = self.current(user)
        history, _ = known_events(loaded, self.store, user)
        timed = loaded.tower.timestamps
        events = [
            {**item_of(loaded, int(row)), "event": loaded.tower.events[code], "timestamp": int(at) if timed else None}
            for row, code, at in zip(history.item, history.event, history.timestamp, strict=True)
        ]
        if not loaded.tower.contexts:
            return events
        contexts = loaded.tower.context_values(history)
        return [{**event, "context": context} for event, context in zip(events, contexts, strict=True)]

    def recommend(self, requests: Sequence[Recommend]) -> list[dict[str, Any] | Refused]:
        """An answer for each request, or why it is refused; all from one loaded export and one run of the tower.

        Requests with unknown users, items, events, features or values are refused.
        """
        self.current()
        canary = self.canary
        groups = [canary if canary is not None and canary.takes(request.unit) else None for request in requests]
        return apart(requests, groups, self._answered)

    def _answered(self, canary: Canary | None, requests: Sequence[Recommend]) -> list[dict[str, Any] | Refused]:
        """Answers from a canary's export, or from that of the others. A canary that fails is rolled back."""
        if canary is None:
            return self._recommend(self.loaded, requests)[0]
        try:
            answers, found = self._recommend(canary.fresh, requests)
        except UNSOUND as error:
            answers, _ = self._recommend(self.loaded, requests)  # raises where the canary is not at fault
            self.swaps.failed(canary, error)
            return answers
        canary.answered.extend(found)
        return answers

    def _recommend(
        self, loaded: LoadedExport, requests: Sequence[Recommend]
    ) -> tuple[list[dict[str, Any] | Refused], list[Represented]]:
        """Answers from one export, and the tower's output for those that were not refused."""
        asked: list[Asked | Refused] = []
        for request in requests:
            try:
                user = asked_user(loaded, self.store, request)
                check_rules(loaded, request)
                asked.append(user)
            except Refused as refused:
                asked.append(refused)
        queries = [a.query for a in asked if isinstance(a, Asked)]
        found = loaded.represent(queries) if queries else []
        rest = iter(found)
        answers = [
            a if isinstance(a, Refused) else self._named(recommended(loaded, request, a, next(rest)))
            for request, a in zip(requests, asked, strict=True)
        ]
        return answers, found

    def current(self, unit: str | None = None) -> LoadedExport:
        """The export that a user gets, with all cold items of the store, also those that another process has taken.

        Raises:
            StoreError: the store cannot be read.
        """
        if self.store.items_after(self.items_seq):
            with self.changing:
                fresh = self.store.items_after(self.items_seq)  # another thread may have taken them up meanwhile
                self.loaded = with_fitting(self.loaded, fresh)
                if self.canary is not None:
                    self.canary.fresh = with_fitting(self.canary.fresh, fresh)
                self.items_seq = max([self.items_seq, *(i.seq for i in fresh)])
        return self._of(unit)

    def _of(self, unit: str | None) -> LoadedExport:
        canary = self.canary
        return canary.fresh if canary is not None and canary.takes(unit) else self.loaded

    def label(self, unit: str | None) -> str:
        """Name of what a user gets, for the metrics: a canary counts apart."""
        canary = self.canary
        return f"{self.name}+canary" if canary is not None and canary.takes(unit) else self.name

    def _named(self, answer: dict[str, Any]) -> dict[str, Any]:
        return {"model_version": answer["model_version"], "export": self.name, **answer}

    def similar(self, request: Similar) -> dict[str, Any]:
        """Items like an item or near a vector, by the cosine of item vectors.

        Raises:
            Refused: there is no such item or value of a filter, or the vector does not fit.
        """
        return self._named(similar_items(self.current(request.unit), request))

    def similar_users(self, request: SimilarUsers) -> dict[str, Any]:
        """Users of the export like a user, by the cosine of the tower's vectors.

        Raises:
            Refused: users alike are off, or something in the request is unknown.
        """
        return self._named(similar_users(self.current(request.unit), self.store, request))

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
            fresh = cold_item(loaded, item.item, item.title, item.features)
            _, left_out = with_items(loaded, [fresh])
            with self.store.writing() as transaction:
                transaction.add_item(item.item, item.title, item.features)
        size = self.current().size
        version = loaded.manifest.model_version
        return {"item": item.item, "model_version": version, "items": size, "left_out": left_out}

    def add_events(self, events: Sequence[NewEvent]) -> list[dict[str, Any] | Refused]:
        """Add events of users, in one transaction; the users' next answers depend on them.

        An event whose item or kind is unknown, or that is not in order, is refused; the others are kept.

        Raises:
            StoreError: none of them could be stored.
        """
        self.current()
        answers: list[dict[str, Any] | Refused] = []
        with self.store.writing() as transaction:
            for event in events:
                loaded = self._of(event.unit)
                most = loaded.tower.max_history + 1
                live, left_out = transaction.events_of(event.user, most), list[str]()
                try:
                    transaction.add_event(event.user, new_event(loaded, event, live, left_out))
                except Refused as refused:
                    answers.append(refused)
                    continue
                known, kept = event.user in loaded.user_of, min(len(live) + 1, most)
                version = loaded.manifest.model_version
                answers.append(
                    {
                        "user": event.user,
                        "known": known,
                        "live_events": kept,
                        "model_version": version,
                        "export": self.name,
                        **({"left_out": left_out} if left_out else {}),
                    }
                )
        return answers

    def swap(self, export: Path, terms: CanaryTerms | None = None) -> dict[str, Any]:
        """As of `Swaps`; the answer is that of `health`.

        Raises:
            Refused: the export cannot be served. What was served stays.
        """
        self.swaps.swap(export, terms)
        return self.health()

    def forget(self, request: Forget) -> dict[str, Any]:
        """Remove the live events of users, or only count them; and say which of the users the served exports have.

        A canary that has them is rolled back.

        Raises:
            StoreError: the events could not be removed.
        """
        loaded, canary = self.loaded, self.canary
        live = self.store.counts(request.users) if request.check else self.store.forget(request.users)
        users = list(dict.fromkeys(request.users))
        in_export = [user for user in users if user in loaded.user_of]
        in_canary = [user for user in users if user in canary.fresh.user_of] if canary else []
        answer = {"export": str(loaded.folder), "in_export": in_export, "in_canary": in_canary, "live_events": live}
        if canary is not None and in_canary:
            answer["canary"] = str(canary.fresh.folder)
            if not request.check:
                self.swaps.roll_back(canary, "users of it are forgotten; clean it, then swap to it again")
        return answer

    def load(self, export: Path, number: int) -> LoadedExport:
        """Load an export, with its users' vectors where they are asked for.

        Raises:
            RunError: it cannot be served.
        """
        loaded = load_export(export, number, self.options.shared)
        if not self.options.similar_users:
            return loaded
        return replace(loaded, user_vectors=load_user_vectors(loaded.folder, loaded.manifest))
