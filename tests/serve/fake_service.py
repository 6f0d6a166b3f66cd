"""A service without an export, for tests of what is around it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from flm_torchrec.serve.event_store import EventStore
from flm_torchrec.serve.resolve import Refused

ANSWER = {"items": [{"item": "i1", "title": "One", "attributes": {}, "score": 0.5}], "model_version": "fake"}


class FakeService:
    """Answers at once, without an export."""

    def __init__(self) -> None:
        self.store = EventStore(None)
        manifest = SimpleNamespace(model_version="fake")
        added = SimpleNamespace(items=())
        self.loaded = SimpleNamespace(number=1, size=0, folder=Path("e"), added=added, manifest=manifest)
        self.name = "fake"
        self.canary = None
        self.swaps = SimpleNamespace(recall=None)
        self.swapped: list[str] = []

    def health(self) -> dict[str, Any]:
        return {"status": "ok"}

    def label(self, unit: str | None) -> str:
        return self.name

    def find_users(self, text: str, limit: int) -> list[str]:
        return ["u"]

    def recommend(self, requests: Any) -> list[Any]:
        return [ANSWER for _ in requests]

    def similar(self, request: Any) -> dict[str, Any]:
        return ANSWER

    def similar_users(self, request: Any) -> dict[str, Any]:
        return {"users": [{"user": "v", "score": 0.5}], "model_version": "fake"}

    def find_items(self, text: str, limit: int) -> list[dict[str, Any]]:
        return [{"item": "i1", "title": "One", "attributes": {}}]

    def add_events(self, events: Any) -> list[Any]:
        return [{"user": event.user, "live_events": 1} for event in events]

    def add_item(self, item: Any) -> dict[str, Any]:
        return {"item": item.item, "left_out": []}

    def forget(self, request: Any) -> dict[str, Any]:
        return {"export": "e", "in_export": [], "in_canary": [], "live_events": {}}

    def swap(self, export: Path, terms: Any = None) -> dict[str, Any]:
        if export.name == "bad":
            raise Refused(422, "export: bad")
        self.swapped.append(str(export))
        return {"status": "ok"}
