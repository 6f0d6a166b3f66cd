"""Metrics of a running server, for Prometheus. Several processes count together in the files of a folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from flm_torchrec.serve.service import Service

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class Gauges(Collector):
    """Numbers that are read when they are asked for: text and reader by name."""

    def __init__(self, readers: Mapping[str, tuple[str, Callable[[], float]]]) -> None:
        self.readers = readers

    def collect(self) -> Iterator[Metric]:
        """As prometheus_client asks."""
        for name, (text, read) in self.readers.items():
            yield GaugeMetricFamily(name, text, value=read())


class ServerMetrics:
    """The metrics of one app. Apps of one process share nothing; processes of one server share their counts."""

    def __init__(self, service: Service) -> None:
        self.registry = CollectorRegistry()
        counts = CollectorRegistry()
        self.requests = Counter("flm_requests", "requests answered", ["route", "status"], registry=counts)
        self.seconds = Histogram(
            "flm_request_seconds", "from arrival to answer", ["route"], buckets=SECONDS, registry=counts
        )
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            MultiProcessCollector(self.registry)  # type: ignore[no-untyped-call]
        else:
            self.registry.register(self.requests)
            self.registry.register(self.seconds)
        self.registry.register(
            Gauges(
                {
                    "flm_generation": ("number of the export served, counted by swaps", lambda: service.loaded.number),
                    "flm_swaps": ("exports swapped in since the start", lambda: service.loaded.number - 1),
                    "flm_items": ("items that can be recommended", lambda: service.loaded.size),
                    "flm_added_items": (
                        "cold items added to the export served",
                        lambda: len(service.loaded.added.items),
                    ),
                    "flm_live_users": ("users with live events", service.store.users),
                }
            )
        )

    def text(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self.registry)
