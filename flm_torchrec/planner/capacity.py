"""A plan's memory and time on each rank, with no process group and no GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torchrec.distributed.planner.types import Perf, Storage
from torchrec.distributed.types import PipelineType

from flm_torchrec.planner.cache import prefetching
from flm_torchrec.planner.constraints import Lookup, Rules, constraints
from flm_torchrec.planner.estimate import DENSE_BYTES, RESERVED
from flm_torchrec.planner.hardware import Cluster
from flm_torchrec.planner.planfile import describe
from flm_torchrec.planner.solve import Solved, solve
from flm_torchrec.planner.volume import sent_bytes

TABLE_PARTS = ("weights", "optimizer", "input_output", "pipeline")


@dataclass(frozen=True)
class Workload:
    """What each rank has to hold and to do in a step."""

    model: nn.Module
    """Its tables are on the meta device."""
    batch_size: int
    """Samples per rank."""
    lookups: Mapping[str, Lookup]
    """By feature, of one sample."""
    optimizer: str
    dense_bytes: int
    """Of the dense part in training."""


def plan_on(workload: Workload, cluster: Cluster, rules: Rules, pipeline: PipelineType) -> Solved:
    """The planner's plan.

    Raises:
        Infeasible: the tables do not fit.
    """
    allowed = constraints(workload.model, rules, workload.lookups)
    if pipeline is PipelineType.TRAIN_PREFETCH_SPARSE_DIST:
        prefetching(workload.model, allowed, workload.batch_size * cluster.world_size)
    return solve(
        workload.model,
        cluster.topology(),
        workload.batch_size,
        allowed,
        workload.optimizer,
        workload.dense_bytes,
        pipeline,
    )


def report(workload: Workload, cluster: Cluster, solved: Solved, pipeline: PipelineType) -> dict[str, Any]:
    """Everything about a plan, as JSON: bytes, milliseconds, ranks."""
    ranks = _ranks(workload, cluster, solved)
    critical = max(ranks, key=lambda rank: rank["ms"]["total"])
    memory = [sum(rank["device"].values()) for rank in ranks]
    times = [rank["ms"]["total"] for rank in ranks]
    return {
        "cluster": cluster.describe(),
        "batch_size": workload.batch_size,
        "optimizer": workload.optimizer,
        "pipeline": pipeline.value,
        "capacity": cluster.capacity,
        "for_tables": int(cluster.capacity * (1 - RESERVED)) - workload.dense_bytes,
        "tables": _tables(solved),
        "ranks": ranks,
        "critical_rank": critical["rank"],
        "step_ms": {**critical["ms"], "dense_all_reduce": _dense_all_reduce(workload, cluster)},
        "sent": {**sent_bytes(solved), "dense": _dense_sent(workload, cluster)},
        "memory_max": max(memory),
        "balance": {
            "memory": max(memory) * len(memory) / sum(memory),
            "time": max(times) * len(times) / sum(times) if sum(times) else 1.0,
        },
        "plan": describe(solved.plan, cluster.world_size),
    }


def _ranks(workload: Workload, cluster: Cluster, solved: Solved) -> list[dict[str, Any]]:
    cuda = cluster.hardware.device == "cuda"
    zero = Storage(hbm=0, ddr=0)
    parts = [dict.fromkeys(TABLE_PARTS, zero) for _ in range(cluster.world_size)]
    perfs = [Perf(0, 0, 0, 0) for _ in range(cluster.world_size)]
    for option in solved.options:
        for shard, split in zip(option.shards, solved.enumerator.split(option), strict=True):
            assert shard.rank is not None and shard.perf is not None
            perfs[shard.rank] = perfs[shard.rank] + shard.perf
            for name, storage in split.items():
                parts[shard.rank][name] = parts[shard.rank][name] + storage
    return [
        {
            "rank": rank,
            "device": {
                **{name: part.hbm if cuda else part.ddr for name, part in parts[rank].items()},
                "dense": workload.dense_bytes,
            },
            "host": {name: part.ddr if cuda else 0 for name, part in parts[rank].items()},
            "ms": _milliseconds(perfs[rank]),
        }
        for rank in range(cluster.world_size)
    ]


def _milliseconds(perf: Perf) -> dict[str, float]:
    """Of the tables' part of a step. The planner's own total leaves the distribution of the ids out."""
    compute = perf.fwd_compute + perf.bwd_compute
    communication = perf.fwd_comms + perf.bwd_comms + perf.input_dist_comms
    return {
        "compute": compute,
        "communication": communication,
        "prefetch": perf.prefetch_compute,
        "total": compute + communication + perf.prefetch_compute,
    }


def _tables(solved: Solved) -> list[dict[str, Any]]:
    return [
        {
            "name": option.name,
            "rows": option.tensor.shape[0],
            "dim": option.tensor.shape[1],
            "bytes": option.tensor.numel() * option.tensor.element_size(),
            "ids_per_sample": sum(
                length * bags for length, bags in zip(option.input_lengths, solved.bags(option.name), strict=True)
            ),
            "sharding_type": option.sharding_type,
            "kernel": option.compute_kernel,
            "ranks": len({shard.rank for shard in option.shards}),
        }
        for option in solved.options
    ]


def _dense_sent(workload: Workload, cluster: Cluster) -> float:
    """Bytes that a rank sends in a ring all-reduce of the dense gradients: 2 (W - 1) / W of them (Patarasuk and Yuan
    2009, Bandwidth optimal all-reduce algorithms)."""
    ranks = cluster.world_size
    return 2 * (ranks - 1) / ranks * workload.dense_bytes / DENSE_BYTES * 4


def _dense_all_reduce(workload: Workload, cluster: Cluster) -> float:
    """Milliseconds at the slowest link; DDP hides some of it in backward."""
    bandwidth = cluster.hardware.inter_gbps if cluster.nodes > 1 else cluster.hardware.intra_gbps
    return _dense_sent(workload, cluster) / (bandwidth * 1e6)
