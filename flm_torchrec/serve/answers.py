"""What a request asks for, in rows of one loaded export, and its answer as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from flm_torchrec.data.history import NO_EVENTS, Events
from flm_torchrec.export.tower.reader import Represented, TowerQuery
from flm_torchrec.names import nearest_key
from flm_torchrec.serve.explain import common_items, common_values, explain
from flm_torchrec.serve.histories import asked_events, events_and_seen
from flm_torchrec.serve.live_store import LiveStore
from flm_torchrec.serve.loaded_export import LoadedExport
from flm_torchrec.serve.messages import Recommend, Similar, SimilarUsers, Whom
from flm_torchrec.serve.ranking import added_by_rules, alike, check_boost, pinned_rows, ranked
from flm_torchrec.serve.resolve import Refused, check_filter, content_of, item_row
from flm_torchrec.serve.user_vectors import nearest_users

MOST_SEEN = 1000
"""Live events of a user whose items are left out, the newest ones: more than the tower reads."""


@dataclass(frozen=True)
class Asked:
    """The user of a request."""

    query: TowerQuery
    seen: np.ndarray  # [n] rows of all items that the user has had, by events and the history
    left_out: list[str]
    """Values of features of the user and of events that were not in training."""


def asked_user(loaded: LoadedExport, store: LiveStore, request: Whom) -> Asked:
    """A request's user, with rows and codes of the export in place of keys and names.

    Raises:
        Refused: an unknown user, item, kind of event, feature or value.
    """
    history, seen, user = NO_EVENTS, NO_EVENTS.item, -1
    if request.user is not None:
        history, seen = known_events(loaded, store, request.user)
        user = loaded.user_of.get(request.user, -1)
    last = int(history.timestamp[-1]) if len(history) else None
    left_out: list[str] = []
    if request.history:
        asked = asked_events(loaded, request.history, last, left_out)
        had = loaded.tower.had(asked)
        history, seen = (history + asked, np.concatenate([seen, had])) if len(history) else (asked, had)
    profile: np.ndarray | None = None
    if request.features is not None:
        profile, unknown = content_of(loaded, "user", request.features)
        left_out += unknown
    return Asked(TowerQuery(history, user, profile), np.unique(seen), left_out)


def known_events(loaded: LoadedExport, store: LiveStore, user: str) -> tuple[Events, np.ndarray]:
    """The user's last events, exported and live, and rows [n] of all items seen.

    Raises:
        Refused: the user is neither in the export nor has live events.
    """
    live = store.events_of(user, max(MOST_SEEN, loaded.tower.max_history + 1))
    if not live and user not in loaded.user_of:
        raise Refused(404, f"user '{user}': not known; {nearest_key(user, loaded.user_of)}")
    return events_and_seen(loaded, user, live)


def check_rules(loaded: LoadedExport, request: Recommend) -> None:
    """Raise Refused where a filter, a rule or a pinned item is unknown."""
    check_filter(loaded, request.filter)
    check_boost(loaded, request.boost)
    pinned_rows(loaded, request)


def recommended(loaded: LoadedExport, request: Recommend, asked: Asked, found: Represented) -> dict[str, Any]:
    """Answer of /v1/recommend.

    Args:
        found: the tower's output for the request's user.
    """
    excluded = asked.seen if request.exclude_seen else NO_EVENTS.item
    best = ranked(loaded, request, loaded.query(found, request.head), excluded, pinned_rows(loaded, request))
    items = [{**item_of(loaded, row), "score": score} for row, score in best]
    if request.explain:
        rows = np.array([row for row, _ in best], np.int64)
        reasons = explain(loaded, found, asked.query.history.item, rows)
        if request.boost:
            added = added_by_rules(loaded, request, rows)
            reasons = [{**reason, "boost": float(by)} for reason, by in zip(reasons, added, strict=True)]
        items = [{**item, "why": why} for item, why in zip(items, reasons, strict=True)]
    answer = {"model_version": loaded.manifest.model_version, "head": request.head, "items": items}
    if asked.left_out:
        answer["left_out"] = asked.left_out
    return answer


def similar_items(loaded: LoadedExport, request: Similar) -> dict[str, Any]:
    """Answer of /v1/similar.

    Raises:
        Refused: there is no such item or value of a filter, or the vector does not fit.
    """
    best = alike(loaded, request)
    items = [{**item_of(loaded, row), "score": score} for row, score in best]
    if request.explain:
        like = [] if request.item is None else [item_row(loaded, request.item, "item")]
        items = [
            {**item, "why": {"in_common": common_values(loaded, row, like)}}
            for item, (row, _) in zip(items, best, strict=True)
        ]
    return {"model_version": loaded.manifest.model_version, "items": items}


def similar_users(loaded: LoadedExport, store: LiveStore, request: SimilarUsers) -> dict[str, Any]:
    """Answer of /v1/users/similar: users of the export, nearest first.

    Raises:
        Refused: the server does not have the users' vectors, or something in the request is unknown.
    """
    asked = asked_user(loaded, store, request)
    left_out = [_user_row(loaded, key, f"exclude.{n}") for n, key in enumerate(request.exclude)]
    (found,) = loaded.represent([asked.query])
    best = nearest_users(loaded, found, request.k, {asked.query.user, *left_out})
    users: list[dict[str, Any]] = [{"user": loaded.users[row].as_py(), "score": score} for row, score in best]
    if request.explain:
        users = [
            {**user, "why": common_items(loaded, row, asked.seen)} for user, (row, _) in zip(users, best, strict=True)
        ]
    answer = {"model_version": loaded.manifest.model_version, "users": users}
    if asked.left_out:
        answer["left_out"] = asked.left_out
    return answer


def item_of(loaded: LoadedExport, row: int) -> dict[str, Any]:
    """An item as answers show it."""
    if row < len(loaded.catalogue):
        return loaded.catalogue.item(row)
    return {"item": loaded.key(row), "title": loaded.title(row), "attributes": loaded.attributes(row)}


def _user_row(loaded: LoadedExport, key: str, where: str) -> int:
    row = loaded.user_of.get(key)
    if row is None:
        raise Refused(422, f"{where}: no user '{key}' in the export; {nearest_key(key, loaded.user_of)}")
    return row
