"""A plan's memory and time on each rank, with no process group and no GPU."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from torchrec.distributed.planner.types import Perf, Storage
from torchrec.distributed.types import PipelineType

from flm_torchrec.distributed.managed import check_rows_shared
from flm_torchrec.planner.cache import set_cache_params
from flm_torchrec.planner.constraints import Rules, constraints
from flm_torchrec.planner.estimate import DENSE_BYTES, RESERVED
from flm_torchrec.planner.hardware import Cluster
from flm_torchrec.planner.loss_work import SENT_BYTES
from flm_torchrec.planner.plan_file import describe
from flm_torchrec.planner.solve import PlannedTables, solve
from flm_torchrec.planner.step import StepWork, step_parts
from flm_torchrec.planner.volume import sent_bytes
from flm_torchrec.planner.workload import Workload

TABLE_PARTS = ("weights", "optimizer", "input_output", "pipeline")


def plan_on(workload: Workload, cluster: Cluster, rules: Rules, pipeline: PipelineType) -> PlannedTables:
    """The planner's plan for a workload on a cluster.

    Raises:
        Infeasible: the tables do not fit.
        ConfigError: a rule does not fit its table, or leaves no sharding type or kernel; or the ranks do not share a
            managed table evenly.
    """
    check_rows_shared(workload.model, cluster.world_size)
    allowed = constraints(workload.model, rules, workload.lookups)
    if pipeline is PipelineType.TRAIN_PREFETCH_SPARSE_DIST:
        set_cache_params(workload.model, allowed, workload.batch_size * cluster.world_size)
    return solve(workload, cluster.topology(), allowed, pipeline)


def report(workload: Workload, cluster: Cluster, planned: PlannedTables, pipeline: PipelineType) -> dict[str, Any]:
    """All numbers about a plan, as JSON: memory in bytes and times in milliseconds, by table and by rank."""
    ranks = _ranks(workload, cluster, planned)
    critical = max(ranks, key=lambda rank: rank["ms"]["total"])
    tables_ms = {**critical["ms"], "dense_all_reduce": _dense_all_reduce(workload, cluster)}
    memory = [sum(rank["device"].values()) for rank in ranks]
    times = [rank["ms"]["total"] for rank in ranks]
    return {
        "cluster": cluster.describe(),
        "batch_size": workload.batch_size,
        "optimizer": workload.optimizer,
        "pipeline": pipeline.value,
        "capacity": cluster.capacity,
        "for_tables": int(cluster.capacity * (1 - RESERVED)) - workload.dense_bytes - _sketches(workload, cluster)[0],
        "tables": _tables(planned),
        "ranks": ranks,
        "critical_rank": critical["rank"],
        "step_ms": tables_ms,
        "whole_step": None if workload.step is None else _whole_step(workload.step, cluster, tables_ms),
        "sent": {**sent_bytes(planned, workload.collectives), "dense": _dense_sent(workload, cluster)},
        "memory_max": max(memory),
        "balance": {
            "memory": max(memory) * len(memory) / sum(memory),
            "time": max(times) * len(times) / sum(times) if sum(times) else 1.0,
        },
        "plan": describe(planned.plan, cluster.world_size),
    }


def _whole_step(work: StepWork, cluster: Cluster, tables_ms: dict[str, float]) -> dict[str, Any]:
    """The work of a rank beside the tables, and the milliseconds of each part of a step."""
    return {"work": asdict(work), "ms": step_parts(cluster, tables_ms, work)}


def _ranks(workload: Workload, cluster: Cluster, planned: PlannedTables) -> list[dict[str, Any]]:
    cuda = cluster.hardware.device == "cuda"
    in_device, in_host = _sketches(workload, cluster)
    zero = Storage(hbm=0, ddr=0)
    parts = [dict.fromkeys(TABLE_PARTS, zero) for _ in range(cluster.world_size)]
    perfs = [Perf(0, 0, 0, 0) for _ in range(cluster.world_size)]
    for option in planned.options:
        for shard, split in zip(option.shards, planned.enumerator.split(option), strict=True):
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
                "sketches": in_device,
            },
            "host": {**{name: part.ddr if cuda else 0 for name, part in parts[rank].items()}, "sketches": in_host},
            "ms": _milliseconds(perfs[rank]),
        }
        for rank in range(cluster.world_size)
    ]


def _sketches(workload: Workload, cluster: Cluster) -> tuple[int, int]:
    """Bytes of a rank's sketches: in the memory that is planned, and in the host memory of a GPU."""
    return (0, workload.sketch_bytes) if cluster.hardware.device == "cuda" else (workload.sketch_bytes, 0)


def _milliseconds(perf: Perf) -> dict[str, float]:
    """The tables' part of a step, by kind. The planner's own total leaves out the distribution of the ids."""
    compute = perf.fwd_compute + perf.bwd_compute
    communication = perf.fwd_comms + perf.bwd_comms + perf.input_dist_comms
    return {
        "compute": compute,
        "communication": communication,
        "prefetch": perf.prefetch_compute,
        "total": compute + communication + perf.prefetch_compute,
    }


def _tables(planned: PlannedTables) -> list[dict[str, Any]]:
    return [
        {
            "name": option.name,
            "rows": option.tensor.shape[0],
            "dim": option.tensor.shape[1],
            "bytes": option.tensor.numel() * option.tensor.element_size(),
            "ids_per_sample": sum(
                length * bags for length, bags in zip(option.input_lengths, planned.bags(option.name), strict=True)
            ),
            "sharding_type": option.sharding_type,
            "kernel": option.compute_kernel,
            "ranks": len({shard.rank for shard in option.shards}),
        }
        for option in planned.options
    ]


def _dense_sent(workload: Workload, cluster: Cluster) -> float:
    """Bytes that a rank sends in a ring all-reduce of the dense gradients: 2 (W - 1) / W of them (Patarasuk and Yuan
    2009, Bandwidth optimal all-reduce algorithms)."""
    ranks = cluster.world_size
    return 2 * (ranks - 1) / ranks * workload.dense_bytes / DENSE_BYTES * SENT_BYTES[workload.collectives]


def _dense_all_reduce(workload: Workload, cluster: Cluster) -> float:
    """Milliseconds at the slowest link; DDP hides some of it in backward."""
    bandwidth = cluster.hardware.inter_gbps if cluster.nodes > 1 else cluster.hardware.intra_gbps
    return _dense_sent(workload, cluster) / (bandwidth * 1e6)
