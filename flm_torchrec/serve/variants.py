"""Several exports that are served at once, each to its share of the users (A/B test)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flm_torchrec.names import nearest
from flm_torchrec.serve.messages import Forget, NewEvent, Recommend, RecommendBatch
from flm_torchrec.serve.resolve import Refused
from flm_torchrec.serve.service import Service
from flm_torchrec.serve.split import Split, apart


class Variants:
    """Services that share a store. A user always gets the same one, also after a restart and in another process.

    Args:
        services: of different names; the first one answers what no user asks for.
    """

    def __init__(self, services: Sequence[Service], split: Split) -> None:
        self.services = tuple(services)
        self.split = split
        self.first = self.services[0]
        self.store = self.first.store

    @classmethod
    def alone(cls, service: Service) -> Variants:
        """One service for all users."""
        return cls([service], Split((1.0,)))

    def of(self, unit: str | None) -> Service:
        """The service for a user, or for another unit that the split is drawn by; None: the first one."""
        return self.first if unit is None else self.services[self.split.of(unit)]

    def named(self, name: str | None) -> Service:
        """The service with a name; None: the only one.

        Raises:
            Refused: there is no such service, or none is named among several.
        """
        names = [service.name for service in self.services]
        if name is None and len(names) == 1:
            return self.first
        if name is None:
            raise Refused(422, f"replaces: several exports are served; name one of {', '.join(names)}")
        if name not in names:
            raise Refused(422, f"replaces: no export '{name}' is served; {nearest(name, names)}")
        return self.services[names.index(name)]

    def names(self, asked: Any) -> list[str]:
        """Which exports answer a request, for the metrics."""
        if isinstance(asked, RecommendBatch):
            return list(dict.fromkeys(name for one in asked.requests for name in self.names(one)))
        unit = getattr(asked, "unit", None)
        return [self.of(unit).label(unit)]

    def health(self) -> dict[str, Any]:
        """Answer of `GET /health`: that of the first one, and all of them by name."""
        return {**self.first.health(), "exports": self.exports()}

    def exports(self) -> list[dict[str, Any]]:
        """What is served under which name, without paths: anyone may ask for it."""
        return [
            {
                "export": service.name,
                "share": share,
                "model_version": service.loaded.manifest.model_version,
                "generation": service.loaded.number,
                "recall": service.swaps.recall,
                "canary": service.canary and service.canary.shown(),
            }
            for service, share in zip(self.services, self.split.shares, strict=True)
        ]

    def follow(self, states: Mapping[str, Mapping[str, Any]]) -> None:
        """Serve what another process serves, by name, as `Swaps.state` has it."""
        for name, state in states.items():
            self.named(name).swaps.follow(state)

    def recommend(self, requests: Sequence[Recommend]) -> list[dict[str, Any] | Refused]:
        """As of `Service`; the requests of each export are answered together."""
        groups = [self.of(request.unit) for request in requests]
        return apart(requests, groups, lambda service, some: service.recommend(some))

    def add_events(self, events: Sequence[NewEvent]) -> list[dict[str, Any] | Refused]:
        """As of `Service`, in one transaction for each export."""
        groups = [self.of(event.unit) for event in events]
        return apart(events, groups, lambda service, some: service.add_events(some))

    def forget(self, request: Forget) -> dict[str, Any]:
        """As of `Service`, for all: "exports" and "canaries" have by name the folders of those that have the users."""
        answers = {service.name: service.forget(request) for service in self.services}
        have = {name: answer["export"] for name, answer in answers.items() if answer["in_export"]}
        live: dict[str, int] = {}
        for answer in answers.values():
            live = {**answer["live_events"], **live}  # the first one has removed them
        return {
            "export": next(iter(have.values()), answers[self.first.name]["export"]),
            "exports": have,
            "canaries": {name: answer["canary"] for name, answer in answers.items() if "canary" in answer},
            "in_export": list(dict.fromkeys(user for answer in answers.values() for user in answer["in_export"])),
            "in_canary": list(dict.fromkeys(user for answer in answers.values() for user in answer["in_canary"])),
            "live_events": live,
        }
