"""A list of tables (YAML) → the workload of a rank, where no data and no model exist yet."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass
from torch import nn
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from flm_torchrec.config.schema import STRICT
from flm_torchrec.errors import ConfigError
from flm_torchrec.planner.constraints import Lookup, checked, read_mapping
from flm_torchrec.planner.estimate import DENSE_BYTES
from flm_torchrec.planner.workload import Workload

META = torch.device("meta")
PRECISIONS = {"fp32": DataType.FP32, "fp16": DataType.FP16}


def _printable(name: str) -> str:
    if not name.isprintable() or not name.strip():
        raise ValueError(f"{name!r} has no letters that can be shown, or others beside; use plain letters and digits")
    return name


@dataclass(frozen=True, config=STRICT)
class TableSpec:
    """One table."""

    name: Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_printable)]
    rows: Annotated[int, Field(ge=1, le=10**12)]
    dim: Annotated[int, Field(ge=4, le=2**16, multiple_of=4)]
    """A multiple of 4, which FBGEMM's kernels need."""
    pooling: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    """Average number of ids of one feature in a sample."""
    features: Annotated[int, Field(ge=1, le=1000)] = 1
    """Number of features that use this table."""
    pooled: bool = True
    """True: the ids of a sample give one vector (a bag). False: each id gives a vector (a sequence)."""


@dataclass(frozen=True, config=STRICT)
class Spec:
    """Everything that a plan depends on, except the cluster."""

    tables: Annotated[tuple[TableSpec, ...], Field(min_length=1, max_length=10_000)]
    batch_size: Annotated[int, Field(ge=1, le=10**9)]
    """Samples of a rank in a step."""
    optimizer: Literal["rowwise_adagrad", "adagrad", "adam", "sgd"] = "rowwise_adagrad"
    precision: Literal["fp32", "fp16"] = "fp32"
    collectives: Literal["fp32", "bf16"] = "fp32"
    """What ranks send vectors and gradients as."""
    dense_parameters: Annotated[int, Field(ge=0, le=10**15)] = 0


def read_spec(path: Path) -> Spec:
    """Read and check a spec.

    Raises:
        ConfigError: an unreadable file, an unknown key with the nearest known one, or a size out of range.
    """
    content = read_mapping(path, "--spec")
    tables = content.get("tables")
    if not isinstance(tables, list):
        raise ConfigError(f"--spec: {path}: 'tables' must be a list of tables, each with name, rows and dim")
    names: set[str] = set()
    for number, entry in enumerate(tables):
        name = str(entry.get("name") or number)[:200] if isinstance(entry, dict) else str(number)
        checked(TableSpec, entry, list(TableSpec.__dataclass_fields__), f"--spec: {path}: table '{name}'")
        if "." in name or hasattr(nn.ModuleDict(), name):
            raise ConfigError(
                f"--spec: {path}: table '{name}': PyTorch keeps this name to itself; use '{name}_id' or so"
            )
        if name in names:
            raise ConfigError(f"--spec: {path}: two tables are named '{name}'; give each a name of its own")
        names.add(name)
    spec: Spec = checked(Spec, content, list(Spec.__dataclass_fields__), f"--spec: {path}")
    return spec


def workload_of_spec(spec: Spec) -> Workload:
    """The spec's tables as TorchRec's modules on the meta device: no memory, however many rows."""
    data_type = PRECISIONS[spec.precision]
    bags, sequences, lookups = [], [], {}
    for table in spec.tables:
        names = [table.name] if table.features == 1 else [f"{table.name}.{n}" for n in range(table.features)]
        lookups.update({name: Lookup(pooling=table.pooling) for name in names})
        size: dict[str, Any] = {"name": table.name, "embedding_dim": table.dim, "num_embeddings": table.rows}
        if table.pooled:
            bags.append(EmbeddingBagConfig(**size, feature_names=names, data_type=data_type))
        else:
            sequences.append(EmbeddingConfig(**size, feature_names=names, data_type=data_type))
    model = nn.Module()
    if bags:
        model.bags = EmbeddingBagCollection(tables=bags, device=META)
    # All tables of an EmbeddingCollection have the same width.
    for dim in sorted({config.embedding_dim for config in sequences}):
        same = [config for config in sequences if config.embedding_dim == dim]
        model.add_module(f"sequences_{dim}", EmbeddingCollection(tables=same, device=META))
    dense = DENSE_BYTES * spec.dense_parameters
    return Workload(model, spec.batch_size, lookups, spec.optimizer, dense, collectives=spec.collectives)
