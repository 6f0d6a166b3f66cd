"""Metrics of a running server, for Prometheus. Several processes count together in the files of a folder."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from flm_torchrec.serve.service import Service
from flm_torchrec.serve.variants import Variants

M = TypeVar("M", bound=MetricWrapperBase)
SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class Gauges(Collector):
    """Numbers that are read when they are asked for: text and reader by name."""

    def __init__(self, readers: Mapping[str, tuple[str, Callable[[], float]]]) -> None:
        self.readers = readers

    def collect(self) -> Iterator[Metric]:
        """As prometheus_client asks."""
        for name, (text, read) in self.readers.items():
            yield GaugeMetricFamily(name, text, value=read())


class ExportGauges(Collector):
    """Numbers of each export that is served, with its name as the label `export`."""

    def __init__(self, services: Sequence[Service]) -> None:
        self.services = services

    def collect(self) -> Iterator[Metric]:
        """As prometheus_client asks."""
        readers: dict[str, tuple[str, Callable[[Service], float]]] = {
            "flm_export_generation": ("number of the export, counted by swaps", lambda one: one.loaded.number),
            "flm_export_items": ("items that can be recommended", lambda one: one.loaded.size),
            "flm_export_canary": (
                "share of the users that get a fresh export", lambda one: one.canary.terms.share if one.canary else 0
            ),
            "flm_export_recall": (
                "recall@100 of the export swapped in or tried last", lambda one: one.swaps.recall or math.nan
            ),
        }  # fmt: skip
        for name, (text, read) in readers.items():
            metric = GaugeMetricFamily(name, text, labels=["export"])
            for one in self.services:
                metric.add_metric([one.name], read(one))
            yield metric


class ServerMetrics:
    """The metrics of one app. Apps of one process share nothing; processes of one server share their counts."""

    def __init__(self, served: Variants) -> None:
        service = served.first
        self.registry = CollectorRegistry()
        counts = CollectorRegistry()
        self.children: dict[tuple[MetricWrapperBase, tuple[str | int, ...]], MetricWrapperBase] = {}
        """By metric and labels: there are as many as the text has lines of them."""
        self.requests = Counter("flm_requests", "requests answered", ["route", "status"], registry=counts)
        self.seconds = Histogram(
            "flm_request_seconds", "from arrival to answer", ["route"], buckets=SECONDS, registry=counts
        )
        self.export_requests = Counter(
            "flm_export_requests", "requests answered by an export", ["export", "route", "status"], registry=counts
        )
        self.export_seconds = Histogram(
            "flm_export_request_seconds", "the same by export", ["export"], buckets=SECONDS, registry=counts
        )
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            MultiProcessCollector(self.registry)  # type: ignore[no-untyped-call]
        else:
            for counted in (self.requests, self.seconds, self.export_requests, self.export_seconds):
                self.registry.register(counted)
        self.registry.register(ExportGauges(served.services))
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

    def count(self, route: str, status: int, seconds: float, exports: Iterable[str]) -> None:
        """A request of a route has been answered, by exports of these names."""
        self._child(self.requests, route, status).inc()
        self._child(self.seconds, route).observe(seconds)
        for export in exports:
            self._child(self.export_requests, export, route, status).inc()
            self._child(self.export_seconds, export).observe(seconds)

    def _child(self, metric: M, *labels: str | int) -> M:
        """As `metric.labels`, which takes longer than to count."""
        found: M | None = self.children.get((metric, labels))  # type: ignore[assignment]
        if found is None:
            found = self.children[metric, labels] = metric.labels(*labels)
        return found

    def text(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self.registry)
