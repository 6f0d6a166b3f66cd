"""What the planner needs to know of each table: how it may be sharded, and how often it is looked up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError
from pydantic import dataclasses as pydantic
from torch import nn
from torchrec.distributed.planner import ParameterConstraints
from torchrec.modules.embedding_configs import BaseEmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from flm_torchrec.config import first_problem
from flm_torchrec.config.schema import STRICT, DistributedConfig
from flm_torchrec.distributed.sharders import AUTO_TYPES, sharders
from flm_torchrec.documents import Unreadable, read_yaml, shortened
from flm_torchrec.errors import ConfigError
from flm_torchrec.names import nearest

KERNELS = ("fused", "fused_uvm_caching", "fused_uvm")
"""In the device's memory; in host memory with a cache on the device; in host memory. The last two on a GPU only."""


@dataclass(frozen=True)
class Lookup:
    """How often a feature is looked up for one sample, on average."""

    pooling: float = 1.0
    """Ids in a bag, such as the tags of one item."""
    bags: float = 1.0
    """Bags in a sample, such as the items of one sequence."""
    seen: np.ndarray | None = field(default=None, repr=False)
    """A sorted sample of the ids that are looked up. None: all rows equally often. TorchRec's planner writes the text
    of its arguments for a log that is off; that of these ids takes longer than the plan."""

    def share(self, first: int, end: int) -> float | None:
        """Share of the ids that are in rows first … end - 1; None if no sample is known."""
        if self.seen is None or not len(self.seen):
            return None
        low, high = np.searchsorted(self.seen, [first, end])
        return float(high - low) / len(self.seen)


@dataclass(eq=False)
class TableConstraints(ParameterConstraints):
    """TorchRec's constraints of a table, and how each feature of the table is looked up."""

    lookups: list[Lookup] = field(default_factory=list)


@pydantic.dataclass(frozen=True, config=STRICT)
class TableRule:
    """One table's entry in the file `distributed.constraints`."""

    sharding_types: tuple[str, ...] = ()
    compute_kernels: tuple[str, ...] = ()
    min_partition: Annotated[int, Field(ge=4, le=2**16)] | None = None
    pooling_factors: tuple[Annotated[float, Field(gt=0, le=1e6)], ...] = ()


@dataclass(frozen=True)
class Rules:
    """Rules for all tables, and rules for single tables, which come from a file."""

    sharding_types: Sequence[str] = tuple(AUTO_TYPES)
    kernels: Sequence[str] = KERNELS[:1]
    tables: Mapping[str, TableRule] = field(default_factory=dict)


def read_rules(config: DistributedConfig, tables: Sequence[str]) -> Rules:
    """The rules of a config, for a model with these tables.

    Raises:
        ConfigError: an unreadable file, or an unknown table, key, type or kernel, with the nearest known one.
    """
    types = tuple(AUTO_TYPES) if config.sharding == "auto" else (config.sharding,)
    if not config.constraints:
        return Rules(types)
    path = Path(config.constraints)
    content = read_mapping(path, "distributed.constraints")
    return Rules(types, tables={str(name): _rule(path, str(name), entry, tables) for name, entry in content.items()})


def constraints(model: nn.Module, rules: Rules, lookups: Mapping[str, Lookup]) -> dict[str, ParameterConstraints]:
    """Constraints of each table for TorchRec's planner, by table name.

    Args:
        lookups: by feature; a feature that is missing here is looked up once per sample.

    Raises:
        ConfigError: a table has more features than pooling factors, or fewer.
    """
    by_table = {}
    for table in table_configs(model):
        rule = rules.tables.get(table.name, TableRule())
        used = [lookups.get(name, Lookup()) for name in table.feature_names]
        factors = list(rule.pooling_factors) or [use.pooling for use in used]
        if len(factors) != len(used):
            raise ConfigError(
                f"distributed.constraints: table '{table.name}' has {len(used)} features"
                f" ({', '.join(table.feature_names)}), but {len(factors)} pooling_factors; give one for each"
            )
        by_table[table.name] = TableConstraints(
            sharding_types=list(rule.sharding_types or rules.sharding_types),
            compute_kernels=list(rule.compute_kernels or rules.kernels),
            min_partition=rule.min_partition,
            pooling_factors=factors,
            num_poolings=[use.bags for use in used],
            feature_names=list(table.feature_names),
            lookups=used,
        )
    return by_table


def offered_types() -> list[str]:
    """Sharding types that at least one kind of table module offers, the simplest first."""
    names = [name for sharder in sharders() for device in ("cpu", "cuda") for name in sharder.sharding_types(device)]
    return list(dict.fromkeys(names))


def table_configs(model: nn.Module) -> list[BaseEmbeddingConfig]:
    """The configs of all tables, in the order of the model's modules."""
    configs: list[BaseEmbeddingConfig] = []
    for module in model.modules():
        if isinstance(module, EmbeddingBagCollection):
            configs += module.embedding_bag_configs()
        elif isinstance(module, EmbeddingCollection):
            configs += module.embedding_configs()
    return configs


def read_mapping(path: Path, option: str) -> dict[str, Any]:
    """The content of a YAML file that holds a mapping.

    Raises:
        ConfigError: the file cannot be read, or holds something else.
    """
    try:
        content = read_yaml(path)
    except Unreadable as error:
        raise ConfigError(f"{option}: {path}: {error}; give a YAML file") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{option}: {path}: must hold names and values, not a {type(content).__name__}")
    return content


def checked(kind: type, entry: Any, known: Sequence[str], where: str) -> Any:
    """Convert a mapping to the dataclass `kind`.

    Raises:
        ConfigError: an unknown key, with the nearest of `known`, or a wrong value.
    """
    if not isinstance(entry, dict):
        raise ConfigError(f"{where}: must hold keys and values, not {shortened(entry)}")
    for key in entry:
        if key not in known:
            raise ConfigError(f"{where}: unknown key '{key}'; {nearest(str(key), known)}")
    try:
        return TypeAdapter(kind).validate_python(entry)
    except ValidationError as error:
        raise ConfigError(f"{where}: {first_problem(error)}") from error


def _rule(path: Path, table: str, entry: Any, tables: Sequence[str]) -> TableRule:
    where = f"distributed.constraints: {path}"
    if table not in tables:
        raise ConfigError(f"{where}: no table '{table}'; {nearest(table, tables)}")
    rule = checked(TableRule, entry, list(TableRule.__dataclass_fields__), f"{where}: table '{table}'")
    for name, given, known in (
        ("sharding_types", rule.sharding_types, offered_types()),
        ("compute_kernels", rule.compute_kernels, KERNELS),
    ):
        for value in given:
            if value not in known:
                raise ConfigError(f"{where}: table '{table}': {name}: no '{value}'; {nearest(value, known)}")
    return rule
