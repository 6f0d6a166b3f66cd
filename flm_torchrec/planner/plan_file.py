"""plan.json, the file of a plan: describe, read, check against a model, and compare."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from torch import nn
from torchrec.distributed.sharding_plan import placement
from torchrec.distributed.types import (
    EmbeddingModuleShardingPlan,
    EnumerableShardingSpec,
    ModuleShardingPlan,
    ParameterSharding,
    ShardingPlan,
    ShardingType,
    ShardMetadata,
)
from torchrec.modules.mc_embedding_modules import BaseManagedCollisionEmbeddingCollection

from flm_torchrec.config import first_problem
from flm_torchrec.distributed.comm import Comm
from flm_torchrec.distributed.sharders import sharders
from flm_torchrec.documents import Unreadable, read_json, shortened
from flm_torchrec.errors import ConfigError
from flm_torchrec.names import nearest
from flm_torchrec.planner.constraints import KERNELS, table_configs

MOST_RANKS = 2**20
"""Maximum in a plan that is read."""
STRICT = ConfigDict(strict=True, extra="forbid")
TABLE_WISE, ROW_WISE = ShardingType.TABLE_WISE.value, ShardingType.ROW_WISE.value
TABLE_ROW_WISE, TABLE_COLUMN_WISE = ShardingType.TABLE_ROW_WISE.value, ShardingType.TABLE_COLUMN_WISE.value
BY_ROWS, OF_ONE_NODE = (ROW_WISE, TABLE_ROW_WISE), (TABLE_ROW_WISE, TABLE_COLUMN_WISE)
Size = Annotated[int, Field(ge=0, lt=2**48)]
Pair = Annotated[list[Size], Field(min_length=2, max_length=2)]


_Home = tuple[str, nn.Module]
"""The module that a table belongs to: its path in the model, and itself."""


class ShardRecord(BaseModel):
    """One shard of plan.json: its rank, its first row and column, and its number of rows and columns."""

    model_config = STRICT
    rank: int
    offset: Pair
    size: Pair


class TableRecord(BaseModel):
    """One table of plan.json."""

    model_config = STRICT
    module: str
    sharding_type: str
    kernel: str
    shards: Annotated[list[ShardRecord], Field(min_length=1)]


class PlanRecord(BaseModel):
    """plan.json."""

    model_config = STRICT
    world_size: Annotated[int, Field(ge=1, le=MOST_RANKS)]
    tables: dict[str, TableRecord]


def describe(plan: ShardingPlan, world_size: int) -> dict[str, Any]:
    """A plan as JSON: the module, sharding type, kernel and shards of each table, as in `PlanRecord`."""
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
    # Sorted, so that a plan that was read is written again with the same bytes.
    return {"world_size": world_size, "tables": dict(sorted(tables.items()))}


def read_plan(path: Path) -> dict[str, Any]:
    """The content of a plan.json, which `describe` gave.

    Raises:
        ConfigError: no such file, or no plan in it.
    """
    try:
        record = read_json(path)
    except Unreadable as error:
        raise ConfigError(f"{path}: {error}; give the plan.json of a run, or write it anew with 'flm plan'") from error
    try:
        TypeAdapter(PlanRecord).validate_python(record)
    except ValidationError as error:
        raise ConfigError(f"{path}: no plan ({first_problem(error)}); write it anew with 'flm plan'") from error
    return record


def load_plan(path: Path, model: nn.Module, comm: Comm) -> ShardingPlan:
    """Read a plan for this model on these ranks.

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
        _check(f"{path}: table '{name}'", table, size, modules[name], comm)
        module = plan.setdefault(table["module"], EmbeddingModuleShardingPlan())
        module[name] = _sharding(table, comm)  # type: ignore[index]
    return ShardingPlan(plan)


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """What differs between two plans, as (what, value in the first, value in the second); empty if nothing does."""
    differing = []
    if one["world_size"] != other["world_size"]:
        differing.append(("ranks", str(one["world_size"]), str(other["world_size"])))
    tables = dict.fromkeys([*one["tables"], *other["tables"]])
    for name in tables:
        left, right = one["tables"].get(name), other["tables"].get(name)
        if left is None or right is None:
            differing.append((name, "there" if left else "not there", "there" if right else "not there"))
            continue
        for key in ("module", "sharding_type", "kernel"):
            if left[key] != right[key]:
                differing.append((f"{name}: {key}", str(left[key]), str(right[key])))
        if left["shards"] != right["shards"]:
            differing.append((f"{name}: shards", _shards(left), _shards(right)))
    return differing


def _shards(table: Mapping[str, Any]) -> str:
    shown = [f"rank {s['rank']}: {s['size'][0]}x{s['size'][1]}" for s in table["shards"][:4]]
    more = len(table["shards"]) - len(shown)
    return ", ".join([*shown, f"{more} more"] if more else shown)


def _modules(model: nn.Module) -> dict[str, _Home]:
    """The module that each table belongs to, by table name."""
    homes: dict[str, _Home] = {}
    for path, module in model.named_modules():
        if not any(path.startswith(f"{inner}.") for inner, _ in homes.values()):
            tables = module._embedding_module if isinstance(module, BaseManagedCollisionEmbeddingCollection) else module
            configs = getattr(tables, "embedding_bag_configs", None) or getattr(tables, "embedding_configs", None)
            homes.update({table.name: (path, module) for table in configs()} if configs else {})
    return homes


def _check(where: str, table: Mapping[str, Any], size: tuple[int, int], home: _Home, comm: Comm) -> None:
    path, module = home
    if table["module"] != path:
        raise ConfigError(f"{where} is in module '{table['module']}', in the model in '{path}'; plan anew")
    kernels = KERNELS if comm.device.type == "cuda" else KERNELS[:1]
    types = next(s for s in sharders() if isinstance(module, s.module_type)).sharding_types(comm.device.type)
    for key, known in (("sharding_type", types), ("kernel", kernels)):
        if table[key] not in known:
            raise ConfigError(f"{where}: no {key} '{table[key]}' is offered here; {nearest(str(table[key]), known)}")
    shards = table["shards"]
    for shard in shards:
        if not 0 <= shard["rank"] < comm.world_size:
            last = comm.world_size - 1
            raise ConfigError(f"{where}: a shard is on rank {shard['rank']}, outside 0 … {last}; plan anew")
    ends = [[o + s for o, s in zip(shard["offset"], shard["size"], strict=True)] for shard in shards]
    planned = tuple(max(end[axis] for end in ends) for axis in (0, 1))
    if planned != size:
        raise ConfigError(
            f"{where} has {planned[0]} rows of {planned[1]}, in the model {size[0]} of {size[1]}; plan anew"
        )
    covered = sum(shard["size"][0] * shard["size"][1] for shard in shards)
    if covered != size[0] * size[1]:
        raise ConfigError(f"{where}: its shards hold {covered} numbers of {size[0] * size[1]}; plan anew")
    if problem := _misplaced(table, size, comm):
        raise ConfigError(f"{where}: {problem}; plan anew")


def _misplaced(table: Mapping[str, Any], size: tuple[int, int], comm: Comm) -> str:
    """Why TorchRec could not look up rows in these shards; empty if it can.

    TorchRec computes the rank of a row: rows must be in blocks of equal size, in the order of the ranks.
    """
    kind, shards = table["sharding_type"], table["shards"]
    ranks = [shard["rank"] for shard in shards]
    if kind == TABLE_WISE and len(shards) > 1:
        return f"it is {kind}, which is one shard, but has {len(shards)}"
    local, node = comm.local_world_size, ranks[0] // comm.local_world_size
    if kind in OF_ONE_NODE and {rank // local for rank in ranks} != {node}:
        return f"it is {kind}, which lies on the ranks of one node ({local} each), but is on ranks {shortened(ranks)}"
    axis = 0 if kind in BY_ROWS else 1
    holders = {ROW_WISE: range(comm.world_size), TABLE_ROW_WISE: range(node * local, (node + 1) * local)}.get(kind)
    if holders is not None and ranks != list(holders):
        return f"it is {kind}, which has a shard on each of the ranks {holders[0]} … {holders[-1]}, in their order"
    block = -(-size[0] // len(shards)) if axis == 0 else 0
    first = 0
    for shard in shards:
        wanted = min(block, size[0] - first) if axis == 0 else shard["size"][1]
        # The last ranks may have no rows, but every shard has columns.
        if (
            shard["offset"] != _at(axis, first, 0)
            or shard["size"] != _at(axis, wanted, size[1 - axis])
            or (axis == 1 and (wanted == 0 or wanted % 4))
        ):
            expected = f"blocks of {block} rows" if axis == 0 else "blocks of whole columns, a multiple of 4 each"
            return f"the shard on rank {shard['rank']} is not where {kind} has it: {expected}, one behind the other"
        first += wanted
    return ""


def _at(axis: int, along: int, across: int) -> list[int]:
    """[row, column], from a number along the axis that is cut and a number across it."""
    return [along, across] if axis == 0 else [across, along]


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
