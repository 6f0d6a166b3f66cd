"""Alternatives to a plan: the smallest cluster that fits, changes that make a plan fit, other numbers of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torchrec.distributed.types import PipelineType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.modules.mc_modules import ManagedCollisionModule

from flm_torchrec.distributed.sharders import AUTO_TYPES
from flm_torchrec.planner.capacity import plan_on, report
from flm_torchrec.planner.constraints import Rules
from flm_torchrec.planner.hardware import Cluster
from flm_torchrec.planner.solve import Infeasible
from flm_torchrec.planner.step import efficiencies, weak_sizes
from flm_torchrec.planner.workload import Workload

MOST_RANKS = 1024
META = torch.device("meta")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "int8": torch.int8}


@dataclass(frozen=True)
class Question:
    """A workload as a function of the number of ranks, and the rules for planning it."""

    workload: Callable[[int], Workload]
    rules: Rules
    pipeline: PipelineType

    def report(self, cluster: Cluster) -> dict[str, Any]:
        """Plan, and give all numbers about the plan.

        Raises:
            Infeasible: the tables do not fit.
        """
        workload = self.workload(cluster.world_size)
        return report(workload, cluster, plan_on(workload, cluster, self.rules, self.pipeline), self.pipeline)

    def fits(self, cluster: Cluster) -> bool:
        """Whether the tables fit on a cluster."""
        try:
            plan_on(self.workload(cluster.world_size), cluster, self.rules, self.pipeline)
        except Infeasible:
            return False
        return True


@dataclass(frozen=True)
class Remedy:
    """One change, tried on the given cluster."""

    name: str
    note: str
    fits: bool
    gap: int
    """Bytes that are still missing where it does not fit."""
    step_ms: float | None


def sharing_evenly(question: Question, cluster: Cluster, sizes: Iterable[int]) -> list[int]:
    """Those sizes whose ranks have equally many rows of each managed table, more than one; TorchRec needs that."""
    model = question.workload(cluster.world_size).model
    rows = [m.buckets() for m in model.modules() if isinstance(m, ManagedCollisionModule)]
    ranks = {size: cluster.of_size(size).world_size for size in sizes}
    return [size for size, n in ranks.items() if all(count % n == 0 and count > n for count in rows)]


def smallest(question: Question, cluster: Cluster) -> int | None:
    """Fewest ranks of this hardware that the tables fit on, at most `MOST_RANKS`; None if there is no such number.

    Numbers that do not share managed tables evenly are left out. Doubles the ranks until the tables fit, then bisects.
    Tries a part of one node, then complete nodes. Assumes that tables which fit on some ranks fit on more.
    """
    per_node = cluster.hardware.per_node
    sizes = [n for n in (1, 2, 4) if n < per_node]
    sizes += [per_node * nodes for nodes in range(1, MOST_RANKS // per_node + 1)]
    sizes = sharing_evenly(question, cluster, sizes)
    if not sizes:
        return None
    low, high = -1, 0
    while not question.fits(cluster.of_size(sizes[high])):
        if high == len(sizes) - 1:
            return None
        low, high = high, min(2 * high + 1, len(sizes) - 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if question.fits(cluster.of_size(sizes[middle])) else (middle, high)
    return sizes[high]


def remedies(question: Question, cluster: Cluster) -> list[Remedy]:
    """Try each change that could make the plan fit, one by one."""
    tried = []
    for name, note, changed in _changes(question, cluster):
        try:
            made = changed.report(cluster)
            tried.append(Remedy(name, note, True, 0, made["step_ms"]["total"]))
        except Infeasible as error:
            tried.append(Remedy(name, note, False, error.gap, None))
    return tried


def sweep(question: Question, cluster: Cluster, sizes: Sequence[int]) -> list[dict[str, Any]]:
    """A row for each number of ranks: memory of the fullest rank and time of the slowest, or the missing bytes."""
    rows: list[dict[str, Any]] = []
    for size in sizes:
        at = cluster.of_size(size)
        row: dict[str, Any] = {"ranks": at.world_size, "nodes": at.nodes}
        try:
            made = question.report(at)
        except Infeasible as error:
            rows.append({**row, "fits": False, "table": error.table, "gap": error.gap})
            continue
        fullest = max(made["ranks"], key=lambda rank: sum(rank["device"].values()))
        rows.append(
            {
                **row,
                "fits": True,
                "memory": fullest["device"],
                "memory_max": made["memory_max"],
                "step_ms": made["step_ms"],
                "balance": made["balance"],
                "samples_per_step": made["batch_size"] * at.world_size,
            }
        )
    return rows


def weak_scaling(question: Question, cluster: Cluster) -> list[dict[str, Any]]:
    """Steps of clusters from one node up, with the work of a rank as on the given cluster; see `step.weak_scaling`.

    Empty where the work beside the tables is not known. Clusters that the tables do not fit on are left out, and so are
    those whose ranks do not share the buckets of a managed table evenly.
    """
    workload = question.workload(cluster.world_size)
    if workload.step is None:
        return []
    same, steps = replace(question, workload=lambda _: workload), []
    for ranks in sharing_evenly(same, cluster, weak_sizes(cluster)):
        at = cluster.of_size(ranks)
        with suppress(Infeasible):
            steps.append((at, same.report(at)["step_ms"]))
    return efficiencies(workload.step, steps)


def with_precision(workload: Workload, precision: str) -> Workload:
    """The same workload with tables of another precision. Its model has only the tables."""
    model = nn.Module()
    for path, module in workload.model.named_modules():
        if isinstance(module, EmbeddingBagCollection | EmbeddingCollection):
            _add(model, path, _retyped(module, DTYPES[precision]))
    return replace(workload, model=model)


def _changes(question: Question, cluster: Cluster) -> Iterator[tuple[str, str, Question]]:
    def changed(kernels: Sequence[str] = (), precision: str = "", optimizer: str = "") -> Question:
        def workload(world_size: int) -> Workload:
            made = question.workload(world_size)
            made = with_precision(made, precision) if precision else made
            return replace(made, optimizer=optimizer or made.optimizer)

        return replace(question, workload=workload, rules=replace(rules, kernels=kernels or rules.kernels))

    rules, gpu = question.rules, cluster.hardware.device == "cuda"
    if not set(AUTO_TYPES) <= set(rules.sharding_types) or rules.tables:
        free = replace(question, rules=Rules(kernels=rules.kernels))
        yield "table-wise or row-wise as the planner likes", "no constraints", free
    caching = ("fused", "fused_uvm_caching")
    if gpu:
        yield "UVM caching", "tables in host memory, a fifth of the rows cached in HBM", changed(caching)
        yield "UVM", "tables in host memory, read over PCIe", changed(("fused", "fused_uvm"))
        yield "fp16 tables", "half the weights: train.sparse_precision=fp16", changed(precision="fp16")
    yield "int8 tables", "for serving only: TorchRec does not train them", changed(precision="int8")
    if question.workload(cluster.world_size).optimizer in ("adam", "adagrad"):
        yield "row-wise Adagrad", "one number of state a row", changed(optimizer="rowwise_adagrad")
        if gpu:
            yield "fp16 tables, row-wise Adagrad", "", changed(precision="fp16", optimizer="rowwise_adagrad")
    if gpu:
        yield "fp16 tables, UVM caching", "", changed(caching, precision="fp16")


def _retyped(
    module: EmbeddingBagCollection | EmbeddingCollection, dtype: torch.dtype
) -> EmbeddingBagCollection | EmbeddingCollection:
    if isinstance(module, EmbeddingBagCollection):
        copied: EmbeddingBagCollection | EmbeddingCollection = EmbeddingBagCollection(
            module.embedding_bag_configs(), device=META
        )
    else:
        copied = EmbeddingCollection(module.embedding_configs(), device=META)
    for owner in copied.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            empty = torch.empty(parameter.shape, dtype=dtype, device=META)
            setattr(owner, name, nn.Parameter(empty, requires_grad=dtype.is_floating_point))
    return copied


def _add(model: nn.Module, path: str, module: nn.Module) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        if not hasattr(model, parent):
            model.add_module(parent, nn.Module())
        model = getattr(model, parent)
    model.add_module(name, module)
