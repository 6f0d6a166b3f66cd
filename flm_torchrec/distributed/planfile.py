"""plan.json: the plan that a run uses or shall use, written, read back and compared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torchrec.distributed.sharding_plan import placement
from torchrec.distributed.types import (
    EmbeddingModuleShardingPlan,
    EnumerableShardingSpec,
    ModuleShardingPlan,
    ParameterSharding,
    ShardingPlan,
    ShardMetadata,
)
from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingBagCollection

from flm_torchrec.distributed.comm import Comm
from flm_torchrec.distributed.constraints import KERNELS, offered_types, table_configs
from flm_torchrec.documents import Unreadable, read_json
from flm_torchrec.errors import ConfigError
from flm_torchrec.names import nearest


def describe(plan: ShardingPlan, world_size: int) -> dict[str, Any]:
    """The plan as JSON: for each table its sharding type, kernel and shards (rank, first row and column, size)."""
    tables = {}
    for path, module in plan.plan.items():
        assert isinstance(module, EmbeddingModuleShardingPlan)
        for table, choice in module.items():
            shards = choice.sharding_spec.shards if choice.sharding_spec else []  # type: ignore[attr-defined]
            tables[table] = {
                "module": path,
                "sharding_type": choice.sharding_type,
                "kernel": choice.compute_kernel,
                "shards": [
                    {"rank": s.placement.rank(), "offset": list(s.shard_offsets), "size": list(s.shard_sizes)}
                    for s in shards
                ],
            }
    # By name: a plan that was read back is written in the same bytes.
    return {"world_size": world_size, "tables": dict(sorted(tables.items()))}


def read_plan(path: Path) -> dict[str, Any]:
    """What `describe` gave, as it was written.

    Raises:
        ConfigError: no such file, or no plan in it.
    """
    try:
        record = read_json(path)
    except Unreadable as error:
        raise ConfigError(f"{path}: {error}; give the plan.json of a run, or write it anew with 'flm plan'") from error
    try:
        for table in record["tables"].values():
            str(table["module"]), table["sharding_type"], table["kernel"]
            for shard in table["shards"]:
                (row, column), (rows, columns) = shard["offset"], shard["size"]
                int(shard["rank"]), int(row), int(column), int(rows), int(columns)
        int(record["world_size"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"{path}: no plan ({type(error).__name__}: {error}); write it anew with 'flm plan'"
        ) from error
    return record


def load_plan(path: Path, model: nn.Module, comm: Comm) -> ShardingPlan:
    """The plan of a file, for this model on these ranks.

    Raises:
        ConfigError: the file holds no plan, or one for other tables, sizes, modules or ranks.
    """
    record = read_plan(path)
    if record["world_size"] != comm.world_size:
        raise ConfigError(
            f"{path}: is a plan for {record['world_size']} ranks, not {comm.world_size}; start as many, or plan anew"
        )
    sizes = {table.name: (table.num_embeddings, table.embedding_dim) for table in table_configs(model)}
    modules = _modules(model)
    for name in record["tables"]:
        if name not in sizes:
            raise ConfigError(f"{path}: the model has no table '{name}'; {nearest(name, sizes)}")
    plan: dict[str, ModuleShardingPlan] = {}
    for name, size in sizes.items():
        if name not in record["tables"]:
            raise ConfigError(f"{path}: has no table '{name}', which the model has; plan anew with 'flm plan'")
        table = record["tables"][name]
        _check(path, name, table, size, modules[name], comm)
        module = plan.setdefault(table["module"], EmbeddingModuleShardingPlan())
        module[name] = _sharding(table, comm)  # type: ignore[index]
    return ShardingPlan(plan)


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """What differs, as (what, in the first, in the second); nothing where the plans are the same."""
    found = []
    if one["world_size"] != other["world_size"]:
        found.append(("ranks", str(one["world_size"]), str(other["world_size"])))
    tables = dict.fromkeys([*one["tables"], *other["tables"]])
    for name in tables:
        left, right = one["tables"].get(name), other["tables"].get(name)
        if left is None or right is None:
            found.append((name, "there" if left else "not there", "there" if right else "not there"))
            continue
        for key in ("module", "sharding_type", "kernel"):
            if left[key] != right[key]:
                found.append((f"{name}: {key}", str(left[key]), str(right[key])))
        if left["shards"] != right["shards"]:
            found.append((f"{name}: shards", _shards(left), _shards(right)))
    return found


def _shards(table: Mapping[str, Any]) -> str:
    shown = [f"rank {s['rank']}: {s['size'][0]}x{s['size'][1]}" for s in table["shards"][:4]]
    more = len(table["shards"]) - len(shown)
    return ", ".join([*shown, f"{more} more"] if more else shown)


def _modules(model: nn.Module) -> dict[str, str]:
    """Where each table lives."""
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        if not any(path.startswith(f"{inner}.") for inner in found.values()):
            tables = module._embedding_module if isinstance(module, ManagedCollisionEmbeddingBagCollection) else module
            configs = getattr(tables, "embedding_bag_configs", None) or getattr(tables, "embedding_configs", None)
            found.update({table.name: path for table in configs()} if configs else {})
    return found


def _check(path: Path, name: str, table: Mapping[str, Any], size: tuple[int, int], module: str, comm: Comm) -> None:
    where = f"{path}: table '{name}'"
    if table["module"] != module:
        raise ConfigError(f"{where} is in module '{table['module']}', in the model in '{module}'; plan anew")
    kernels = KERNELS if comm.device.type == "cuda" else KERNELS[:1]
    for key, known in (("sharding_type", offered_types()), ("kernel", kernels)):
        if table[key] not in known:
            raise ConfigError(f"{where}: no {key} '{table[key]}' is offered here; {nearest(str(table[key]), known)}")
    covered = 0
    for shard in table["shards"]:
        if not 0 <= shard["rank"] < comm.world_size:
            last = comm.world_size - 1
            raise ConfigError(f"{where}: a shard is on rank {shard['rank']}, outside 0 … {last}; plan anew")
        covered += shard["size"][0] * shard["size"][1]
    ends = [[o + s for o, s in zip(shard["offset"], shard["size"], strict=True)] for shard in table["shards"]]
    planned = tuple(max((end[axis] for end in ends), default=0) for axis in (0, 1))
    if planned != size:
        raise ConfigError(
            f"{where} has {planned[0]} rows of {planned[1]}, in the model {size[0]} of {size[1]}; plan anew"
        )
    if covered != size[0] * size[1]:
        raise ConfigError(f"{where}: its shards hold {covered} numbers of {size[0] * size[1]}; plan anew")


def _sharding(table: Mapping[str, Any], comm: Comm) -> ParameterSharding:
    shards = [
        ShardMetadata(
            shard_offsets=shard["offset"],
            shard_sizes=shard["size"],
            placement=placement(comm.device.type, shard["rank"], comm.local_world_size),
        )
        for shard in table["shards"]
    ]
    return ParameterSharding(
        sharding_type=table["sharding_type"],
        compute_kernel=table["kernel"],
        ranks=[shard["rank"] for shard in table["shards"]],
        sharding_spec=EnumerableShardingSpec(shards),
    )
