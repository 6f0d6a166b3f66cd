"""A client of `flm serve` that needs nothing but Python.

from flm_torchrec.client import Client

client = Client("http://127.0.0.1:8000")
for item in client.recommend(user="user7", k=5).items:
    print(item.item, item.title, item.score)
client.add_event("user7", "item3")
"""

from __future__ import annotations

import json
import ssl
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

from flm_torchrec.errors import FlmError


class ServiceError(FlmError):
    """The service refused a request, or does not answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        """HTTP status of the answer; 0: there was none."""


@dataclass(frozen=True)
class Item:
    """An item of an answer."""

    item: str
    title: str
    attributes: Mapping[str, Sequence[str]]
    score: float = 0.0
    why: Mapping[str, Any] | None = None
    """The reason, where `explain` was given."""


@dataclass(frozen=True)
class ServiceAnswer:
    """Items, best first, and the model that they come from."""

    items: tuple[Item, ...]
    model_version: str
    left_out: tuple[str, ...] = ()
    """Values of features that were not in training."""
    export: str = ""
    """Name of the export that answered, where the server serves several."""


@dataclass(frozen=True)
class NearUser:
    """A user of an answer."""

    user: str
    score: float
    """Cosine of the vectors of the two users."""
    why: Mapping[str, Any] | None = None
    """What both did, where `explain` was given."""


@dataclass(frozen=True)
class Client:
    """Requests to one server, each on a connection of its own. Safe to use from several threads.

    Every method raises ServiceError where the service refuses the request or does not answer.
    """

    url: str
    """Such as http://127.0.0.1:8000."""
    key: str = ""
    """API key; empty: none."""
    timeout: float = 10.0
    """Seconds to wait for an answer."""
    tls: ssl.SSLContext | None = None
    """For https, what to trust; None: the certificates of the system."""

    def recommend(self, **request: Any) -> ServiceAnswer:
        """Items for a user, a history or features; the fields are those of `POST /v1/recommend`."""
        return _answer(self.post("/v1/recommend", request))

    def recommend_batch(self, requests: Sequence[Mapping[str, Any]]) -> list[ServiceAnswer]:
        """An answer for each of up to 64 requests, all from one model."""
        return [_answer(one) for one in self.post("/v1/recommend/batch", {"requests": list(requests)})["answers"]]

    def similar(self, **request: Any) -> ServiceAnswer:
        """Items like an item or near a vector; the fields are those of `POST /v1/similar`."""
        return _answer(self.post("/v1/similar", request))

    def similar_users(self, **request: Any) -> list[NearUser]:
        """Users like a user; the fields are those of `POST /v1/users/similar`. The server must allow it."""
        return [NearUser(**one) for one in self.post("/v1/users/similar", request)["users"]]

    def add_event(self, user: str, item: str, **more: Any) -> int:
        """Keep an event; the number of live events that the user's next answer takes into account.

        Args:
            more: event, value, timestamp, context: a mapping of features of events to values.
        """
        return int(self.post("/v1/events", {"user": user, "item": item, **more})["live_events"])

    def add_item(self, item: str, title: str = "", **features: Any) -> list[str]:
        """Add a cold item; the values of features that were not in training, which are left out."""
        return list(self.post("/v1/items", {"item": item, "title": title, "features": features})["left_out"])

    def find_items(self, text: str, limit: int = 20) -> list[Item]:
        """Items whose title or key contains the text."""
        return [Item(**one) for one in self.get("/v1/items", query=text, limit=limit)]

    def events(self, user: str) -> list[dict[str, Any]]:
        """The user's last events, oldest first."""
        return list(self.get("/v1/events", user=user))

    def health(self) -> dict[str, Any]:
        """Which export is served, and its size."""
        return dict(self.get("/health"))

    def swap(self, export: str, **more: Any) -> dict[str, Any]:
        """Serve another export; needs an admin key.

        Args:
            more: replaces, canary, minutes.
        """
        return dict(self.post("/v1/swap", {"export": export, **more}))

    def forget(self, users: Sequence[str], check: bool = False) -> dict[str, Any]:
        """Remove the live events of users; needs an admin key. "export" is the folder that is served, "in_export" which
        of the users it has, "live_events" how many were removed of each.

        Args:
            check: remove nothing, only say what there is.
        """
        return dict(self.post("/v1/forget", {"users": list(users), "check": check}))

    def get(self, path: str, **parameters: Any) -> Any:
        """The answer to a GET request."""
        return self._ask(urllib.request.Request(f"{self.url.rstrip('/')}{path}?{urlencode(parameters)}"))

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The answer to a POST request of JSON."""
        content = json.dumps(body, allow_nan=False).encode()
        headers = {"Content-Type": "application/json"}
        return self._ask(urllib.request.Request(f"{self.url.rstrip('/')}{path}", content, headers))

    def _ask(self, request: urllib.request.Request) -> Any:
        if self.key:
            request.add_header("Authorization", f"Bearer {self.key}")
        try:
            with urllib.request.urlopen(request, timeout=self.timeout, context=self.tls) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise ServiceError(error.code, _detail(error)) from error
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            raise ServiceError(0, f"{self.url}: {reason}; is 'flm serve' running there?") from error


def _answer(told: Mapping[str, Any]) -> ServiceAnswer:
    items = tuple(Item(**one) for one in told["items"])
    left_out = tuple(told.get("left_out", ()))
    return ServiceAnswer(items, told["model_version"], left_out, told.get("export", ""))


def _detail(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["detail"])
    except (ValueError, KeyError, TypeError):
        return f"answered {error.code} without a reason"
