"""The sharded model of a run, with its first weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardingPlan

from flm_torchrec.config import Config
from flm_torchrec.config.precision import precision_beside
from flm_torchrec.data.schema import Schema
from flm_torchrec.data.sketch import kept_bytes
from flm_torchrec.data.weights import label_weights
from flm_torchrec.distributed.candidates import CandidateRanks
from flm_torchrec.distributed.comm import Comm
from flm_torchrec.distributed.managed import check_managed
from flm_torchrec.distributed.shard import shard
from flm_torchrec.errors import ConfigError
from flm_torchrec.model.label import LabelDense
from flm_torchrec.model.pretrain import Dense, PretrainModel
from flm_torchrec.model.tables import hold_in_half
from flm_torchrec.planner.constraints import Lookup
from flm_torchrec.planner.estimate import dense_bytes
from flm_torchrec.planner.plan import make_plan
from flm_torchrec.planner.workload import Workload


def check_device(config: Config, device: torch.device) -> None:
    """Refuse to learn on a CPU with settings of GPUs. A CPU evaluates and exports what has learned with them.

    Raises:
        ConfigError: names the setting.
    """
    if device.type == "cuda":
        return
    if config.loss.precision == "tf32":
        raise ConfigError("loss.precision: tf32 is a precision of GPUs, and this runs on a CPU; use fp32 or bf16")
    if config.train.sparse_optimizer == "adam":
        raise ConfigError("train.sparse_optimizer: 'adam' has no CPU kernel in FBGEMM; use 'rowwise_adagrad'")
    if config.train.sparse_precision == "fp16":
        raise ConfigError(
            "train.sparse_precision: fp16 needs a GPU; FBGEMM's kernels for CPUs round each update to the nearest"
            " number, so that tables stop learning; use fp32"
        )


def set_precision(config: Config, device: torch.device) -> None:
    """Let products of float32 matrices use TF32 where `loss.precision` allows it and the device has it."""
    beside = precision_beside(config.loss.precision, device.type)
    torch.set_float32_matmul_precision("high" if beside == "tf32" else "highest")


def build(
    schema: Schema, config: Config, comm: Comm, count_lookups: Callable[[], Mapping[str, Lookup]], freeze: bool = False
) -> tuple[DistributedModelParallel, ShardingPlan]:
    """The sharded model with its first weights, the same for any number of ranks.

    Args:
        count_lookups: how often features are looked up; the rank that plans calls it.
        freeze: keep the layers that `finetune.tower` names from learning.
    """
    _candidate_ranks(config, comm).check()
    model = make_model(schema, config, comm)
    if freeze:
        model.tower.freeze(config.finetune.tower)
    check_managed(model, comm.world_size, config.distributed.sharding)
    fsdp = config.distributed.dense == "fsdp"

    def workload() -> Workload:
        return Workload(
            model=model,
            batch_size=-(-config.train.batch_size // comm.world_size),
            lookups=count_lookups(),
            optimizer=config.train.sparse_optimizer,
            # With fsdp each rank holds a slice of the dense part.
            dense_bytes=dense_bytes(model) // (comm.world_size if fsdp else 1),
            sketch_bytes=kept_bytes(schema.items, config.model.dim),
            collectives=config.distributed.collectives,
        )

    plan = make_plan(model, comm, config.distributed, workload)
    sliced = model.tower.sliceable() if fsdp else []
    return shard(model, plan, comm, config.train, sliced, config.distributed.replicas), plan


def make_model(schema: Schema, config: Config, comm: Comm) -> PretrainModel:
    """The model with its first dense weights; its tables are on the meta device."""
    torch.manual_seed(config.train.seed)
    dense: Callable[..., Dense] = Dense
    if config.finetune.source and config.finetune.task == "label":
        dense = partial(LabelDense, labels=label_weights(config.finetune.labels))
    longest = config.data.max_history + 1
    model = PretrainModel(schema, config.model, config.loss, longest, _candidate_ranks(config, comm), dense)
    if config.train.sparse_precision == "fp16":
        hold_in_half(model)
    return model


def _candidate_ranks(config: Config, comm: Comm) -> CandidateRanks:
    return CandidateRanks(comm, config.loss.candidates, config.distributed.timeout)
