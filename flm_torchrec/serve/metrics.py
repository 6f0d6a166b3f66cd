"""Metrics of a running server, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from flm_torchrec.serve.service import Service

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class ServerMetrics:
    """The metrics of one app. Apps of one process share nothing."""

    def __init__(self, service: Service) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("flm_requests", "requests answered", ["route", "status"], registry=self.registry)
        self.seconds = Histogram(
            "flm_request_seconds", "from arrival to answer", ["route"], buckets=SECONDS, registry=self.registry
        )
        gauges = {
            "flm_generation": ("number of the export served, counted by swaps", lambda: service.loaded.number),
            "flm_swaps": ("exports swapped in since the start", lambda: service.loaded.number - 1),
            "flm_items": ("items that can be recommended", lambda: service.loaded.size),
            "flm_added_items": ("cold items added to the export served", lambda: len(service.loaded.added.items)),
            "flm_live_users": ("users with live events", service.store.users),
        }
        for name, (text, read) in gauges.items():
            Gauge(name, text, registry=self.registry).set_function(read)

    def text(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self.registry)
