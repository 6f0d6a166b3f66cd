"""Pretraining as a whole: data, plan, model, loop, best checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardingPlan

from flm_torchrec.config import Config, nearest
from flm_torchrec.data.assemble import Assembler
from flm_torchrec.data.loader import Negatives, TrainLoader, windows
from flm_torchrec.data.prepared import PreparedData, load_prepared
from flm_torchrec.data.schema import Schema
from flm_torchrec.data.splits import Examples, Splits, newest, split
from flm_torchrec.distributed.comm import Comm, process_group
from flm_torchrec.distributed.plan import describe, make_plan
from flm_torchrec.distributed.shard import make_optimizer, shard
from flm_torchrec.errors import ConfigError
from flm_torchrec.evaluation.evaluate import evaluate_heads
from flm_torchrec.evaluation.protocol import HEADS
from flm_torchrec.model.pretrain import PretrainModel
from flm_torchrec.training.checkpoint import save_checkpoint
from flm_torchrec.training.encode import ModelEncoder
from flm_torchrec.training.loop import Finished, fit, total_steps
from flm_torchrec.training.record import Record, check_run_folder, new_run_folder

BEST = "checkpoints/best"


def build(schema: Schema, config: Config, comm: Comm) -> tuple[DistributedModelParallel, ShardingPlan]:
    """The sharded model with its first weights, the same for any number of ranks."""
    torch.manual_seed(config.train.seed)
    model = PretrainModel(schema, config.model, config.loss, config.data.max_history + 1, comm)
    plan = make_plan(model, comm, config.distributed, -(-config.train.batch_size // comm.world_size))
    return shard(model, plan, comm, config.train), plan


def encoder(
    model: DistributedModelParallel, data: PreparedData, fit: np.ndarray, examples: Examples, config: Config, comm: Comm
) -> ModelEncoder:
    block = max(config.eval.user_block, -(-config.eval.item_block // config.data.max_history))
    return ModelEncoder(model, data, fit, examples, comm, config.model.dim, config.data.max_history, block)


def make_loader(data: PreparedData, splits: Splits, config: Config, comm: Comm) -> TrainLoader:
    """This rank's training batches."""
    learnt = splits.fit(data)
    counts = np.bincount(data.item[learnt], minlength=data.schema.items)
    negatives = Negatives(counts, config.loss.negatives, config.loss.negative_power)
    return TrainLoader(
        windows(data, splits, config.data.max_history),
        Assembler(
            data,
            learnt,
            item_rows=_most_items(data.schema, config, comm),
            fusion_only=newest(data, splits, config.loss.fusion_holdout, config.train.seed),
        ),
        negatives,
        config.train.batch_size,
        config.train.seed,
        comm.rank,
        comm.world_size,
    )


def pretrain(config: Config) -> Finished:
    """Train one run; collective. Leaves the run folder `config.train.run`, best checkpoint in it.

    Raises:
        FlmError: config, data or run folder is wrong; before anything is written where that can be known.
    """
    check_select(config)
    check_run_folder(config)
    data = load_prepared(config.data.path, config.data.features)
    splits = split(data, config.data.split, config.data.holdout)
    with process_group(config.distributed) as comm:
        model, plan = build(data.schema, config, comm)
        loader = make_loader(data, splits, config, comm)
        # After planning, which all ranks do together: by now each has looked for an older run.
        folder = new_run_folder(config) if comm.main else None
        with Record(folder, total_steps(config.train, len(loader))) as record:
            record.write_json("plan.json", describe(plan))
            return _fit(model, loader, data, splits, config, comm, record)


def check_select(config: Config) -> None:
    """Raise ConfigError where `train.select` is no metric that validation will have."""
    metrics = ["mrr", *(f"{m}@{k}" for m in ("hr", "ndcg") for k in config.eval.ks)]
    known = [f"{head}/{metric}" for head in HEADS for metric in metrics]
    if config.train.select not in known:
        raise ConfigError(
            f"train.select: no validation metric '{config.train.select}'; {nearest(config.train.select, known)}"
        )


def _fit(
    model: DistributedModelParallel, loader: TrainLoader, data: PreparedData, splits: Splits,
    config: Config, comm: Comm, record: Record,
) -> Finished:  # fmt: skip
    learnt = splits.fit(data)
    valid = _sample(splits.valid, config.train.eval_users, config.train.seed)
    encode = encoder(model, data, learnt, valid, config, comm)

    def validate() -> dict[str, float]:

        return evaluate_heads(data, valid, encode, comm, config.eval)

    def save(step: int, metrics: dict[str, float]) -> None:
        meta = {"step": step, "valid": metrics, "data": data.schema.name}
        save_checkpoint(Path(config.train.run) / BEST, model, meta, comm)

    record.say(
        f"{data.schema.name}: {data.schema.users} users, {data.schema.items} items, {int(learnt.sum())} events to"
        f" learn from; {comm.world_size} {'ranks' if comm.world_size > 1 else 'rank'} on {comm.device.type}"
    )
    torch.manual_seed(config.train.seed + comm.rank)  # from here on dropout, which ranks draw apart
    optimizer = make_optimizer(model, config.train)
    finished = fit(model, optimizer, loader, config.train, comm, record, validate, save)
    record.say(
        f"{finished.steps} steps in {finished.seconds:.0f} s;"
        f" best {config.train.select} {finished.best:.4f} at step {finished.best_step}"
    )
    return finished


def _most_items(schema: Schema, config: Config, comm: Comm) -> int:
    """Most different items in a rank's batch, or 0 where ranks need not agree on it."""
    if comm.world_size == 1:
        return 0
    drawn = schema.items if config.loss.negatives == "all" else config.loss.negatives
    sequences = -(-config.train.batch_size // comm.world_size)
    return min(schema.items, sequences * (config.data.max_history + 1) + -(-drawn // comm.world_size))


def _sample(examples: Examples, most: int, seed: int) -> Examples:
    if not most or most >= len(examples):
        return examples
    return examples.take(np.sort(np.random.default_rng(seed).choice(len(examples), most, replace=False)))
