"""A step as a whole: tables, all-reduce, losses, dense part and input; where a cluster stops scaling; what it costs.

Every part is bytes over a bandwidth, or FLOP over a peak, of the data sheet. No part hides another, and no latency is
added: good for comparing clusters, no forecast of a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flm_torchrec.config.precision import precision_beside
from flm_torchrec.planner.hardware import Cluster
from flm_torchrec.planner.loss_work import KINDS, LossWork

PARTS = {
    "tables": "tables",
    "all_reduce": "all-reduce of the dense part",
    "loss_sent": "what the losses send",
    "loss_flop": "FLOP of the losses",
    "dense_flop": "FLOP of the dense part",
    "input": "input",
}
"""Parts of a step, in words."""
LEAST_EFFICIENCY = 0.7
"""A cluster scales as long as a step on one node takes at least this share of the time of a step on all."""
WEAK_SIZES, LARGEST = 128, 1024
"""Ranks that weak scaling is followed to: so many, or eight times the cluster, up to the largest number."""


@dataclass(frozen=True)
class StepWork:
    """The work of a rank in a step beside its tables."""

    loss: LossWork
    candidates: str
    """`loss.candidates`."""
    precision: str
    """`loss.precision`."""
    dense_flop: float
    """Of the products of the tower, forward and backward."""
    input_bytes: float
    """Of a batch, which goes to the device."""
    steps: int
    """Of an epoch."""


def step_parts(
    cluster: Cluster, tables: Mapping[str, float], work: StepWork, kind: str | None = None
) -> dict[str, float]:
    """Milliseconds of each part of a step, and their total.

    Args:
        tables: `step_ms` of a report.
        kind: a setting of `loss.candidates`, in place of the work's own.
    """
    kind, hardware = kind or work.candidates, cluster.hardware
    ranks, node = cluster.world_size, cluster.per_node
    away = cluster.nodes > 1 and kind != "node"
    link = hardware.inter_gbps if away else hardware.intra_gbps
    beside = cluster.tflops(precision_beside(work.precision, hardware.device))
    parts = {
        "tables": tables["total"],
        "all_reduce": tables["dense_all_reduce"],
        "loss_sent": work.loss.sent(kind, ranks, node) / (link * 1e6),
        "loss_flop": work.loss.flop(kind, ranks, node) / (cluster.tflops(work.precision) * 1e9),
        "dense_flop": work.dense_flop / (beside * 1e9),
        "input": work.input_bytes / (hardware.host_link_gbps * 1e6) if hardware.device == "cuda" else 0.0,
    }
    return {**parts, "total": sum(parts.values())}


def epoch_cost(cluster: Cluster, work: StepWork, step_ms: float, price: float | None) -> dict[str, float]:
    """Steps, seconds and, with a price of a node and hour, the price of an epoch."""
    seconds = work.steps * step_ms / 1000
    found = {"steps": work.steps, "seconds": seconds}
    return found if price is None else {**found, "price": seconds / 3600 * cluster.nodes * price}


def weak_sizes(cluster: Cluster) -> list[int]:
    """Numbers of ranks that weak scaling is looked at: one node, two, four and so on."""
    node = cluster.hardware.per_node
    most = max(node, min(LARGEST, max(WEAK_SIZES, 8 * cluster.world_size)))
    return [node * 2**n for n in range(11) if node * 2**n <= most]


def efficiencies(work: StepWork, steps: Sequence[tuple[Cluster, Mapping[str, float]]]) -> list[dict[str, Any]]:
    """Weak scaling: a row for each cluster and setting of `loss.candidates`: its parts, and its
    efficiency, which is the time of a step on the first cluster over its own.

    Args:
        work: of a rank, the same on every cluster.
        steps: clusters, the smallest first, each with `step_ms` of its plan for that work.
    """
    rows = []
    for kind in KINDS:
        first: float | None = None
        for cluster, tables in steps:
            parts = step_parts(cluster, tables, work, kind)
            first = first or parts["total"]
            efficiency = first / parts["total"] if parts["total"] else 1.0
            rows.append({"candidates": kind, "ranks": cluster.world_size, "efficiency": efficiency, "step_ms": parts})
    return rows


def scaling_ends(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """By setting of `loss.candidates`, a sentence: at how many ranks a cluster stops scaling, and what grows there."""
    sentences = []
    for kind in KINDS:
        of_kind = [row for row in rows if row["candidates"] == kind]
        past = [row for row in of_kind if row["efficiency"] < LEAST_EFFICIENCY]
        if not of_kind:
            return []
        last = of_kind[-1]
        if not past:
            sentences.append(f"{kind}: scales to {last['ranks']:,} ranks, efficiency {last['efficiency']:.0%} there")
            continue
        at, first = past[0]["step_ms"], of_kind[0]["step_ms"]
        grown = max(PARTS, key=lambda part: at[part] - first[part])
        sentences.append(
            f"{kind}: stops scaling at {past[0]['ranks']:,} ranks, efficiency {past[0]['efficiency']:.0%}; what grows:"
            f" {PARTS[grown]}, {first[grown]:.3f} to {at[grown]:.3f} ms"
        )
    return sentences
