"""Training as a whole: data, plan, model, loop, best checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import torch

from flm_torchrec.config import Config
from flm_torchrec.config.heads import HEADS, REPRESENTATIONS
from flm_torchrec.data.collate import Known
from flm_torchrec.data.dataset import PreparedData
from flm_torchrec.data.splits import Examples, sampled
from flm_torchrec.data.stream_loader import StreamLoader
from flm_torchrec.distributed.comm import Comm, process_group
from flm_torchrec.distributed.shard import make_optimizer
from flm_torchrec.errors import ConfigError
from flm_torchrec.evaluation.evaluate import blocks_of, evaluate_heads
from flm_torchrec.names import nearest
from flm_torchrec.planner.plan_file import describe
from flm_torchrec.training.build import build, set_precision
from flm_torchrec.training.checkpoint.manager import BEST, Checkpoints, Progress, load_checkpoint, load_matching
from flm_torchrec.training.encoder import ModelEncoder
from flm_torchrec.training.fusion_weights import choose_weights
from flm_torchrec.training.given import check_given
from flm_torchrec.training.identity import has_ids_of
from flm_torchrec.training.loaders import make_loader
from flm_torchrec.training.logger import Record
from flm_torchrec.training.lookup_counts import lookups_of
from flm_torchrec.training.loop import Finished, Validate, fit, total_steps
from flm_torchrec.training.run_folder import check_run_folder, claimed, open_run_folder
from flm_torchrec.training.scope import Scope, load_data, scope_of


def pretrain(config: Config) -> Finished:
    """Train one run; collective. Leaves the run folder `config.train.run`, best checkpoint in it.

    Raises:
        FlmError: config, data or run folder is wrong; before anything is written where that can be known.
    """
    if config.finetune.source:
        raise ConfigError("finetune.source: is set; 'flm train' pretrains, fine-tune with 'flm finetune'")
    check_select(config)
    data = load_data(config)
    scope = scope_of(config, data)
    with ExitStack() as stack:
        comm = stack.enter_context(process_group(config.distributed))
        check_given(comm, config, data)
        stack.enter_context(claimed(config.train.run, comm))
        check_run_folder(config, comm)
        job = Job(config, data, scope, comm)
        with open_run_folder(config, data, comm, job.total_steps) as record:
            return job.fit(record)


def check_select(config: Config) -> None:
    """Raise ConfigError where `train.select` is no metric that validation will have."""
    metrics = ["mrr", *(f"{m}@{k}" for m in ("hr", "ndcg") for k in config.eval.ks)]
    known = [f"{head}/{metric}" for head in REPRESENTATIONS for metric in metrics]
    if config.train.select not in known:
        raise ConfigError(
            f"train.select: no validation metric '{config.train.select}'; {nearest(config.train.select, known)}"
        )
    head = config.train.select.partition("/")[0]
    if getattr(config.loss, head) == 0:
        raise ConfigError(f"train.select: the {head} head is not trained; set loss.{head}, or select by another head")
    if config.model.fusion != "sum" and config.loss.fused == 0:
        raise ConfigError(f"loss.fused is 0, so nothing trains model.fusion={config.model.fusion}; set one of the two")


class Job:
    """A sharded model on its data, of pretraining or of fine-tuning, with new weights until others are loaded.

    Collective.
    """

    def __init__(self, config: Config, data: PreparedData, scope: Scope, comm: Comm) -> None:
        set_precision(config, comm.device)
        self.config = config
        self.data = data
        self.scope = scope
        self.comm = comm
        self.loaded: str | None = None
        self.loader = make_loader(data, scope, config, comm)
        if isinstance(self.loader, StreamLoader):
            self.loader.check_ranks()
        looked = partial(lookups_of, self.loader)
        tuning = config.finetune
        if not tuning.source or tuning.start == "scratch":
            self.model, self.plan = build(data.schema, config, comm, looked)
        else:
            if self.same_tables:
                config = replace(config, train=replace(config.train, sparse_lr=tuning.sparse_lr))
            self.model, self.plan = build(data.schema, config, comm, looked, freeze=True)
        self.optimizer = make_optimizer(self.model, config.train)

    def take_over(self) -> None:
        """Put the weights of the fine-tuning's source into the model, unless it starts from scratch."""
        if self.config.finetune.start == "pretrained":
            source = Path(self.config.finetune.source) / BEST
            self.loaded = load_matching(source, self.model, self.same_tables, self.comm)

    @cached_property
    def same_tables(self) -> bool:
        """Whether ids mean what they mean in the fine-tuning's source, so that its tables are of use."""
        return has_ids_of(Path(self.config.finetune.source), self.data.path, self.data.fingerprint)

    @property
    def total_steps(self) -> int:
        return total_steps(self.config.train, len(self.loader))

    @cached_property
    def known(self) -> Known:
        """What made ids known to the model."""
        stream = self.scope.stream
        return Known.by(self.data, self.scope.known, values=True) if stream is None else stream.known

    def encoder(self, examples: Examples) -> ModelEncoder:
        """The model as an encoder of the examples' users and of items."""
        config = self.config
        block = max(config.eval.user_block, -(-config.eval.item_block // config.data.max_history))
        return ModelEncoder(
            self.model, self.data, self.known, examples, self.comm, config.model.dim, config.data.max_history, block,
        )  # fmt: skip

    def fit(self, record: Record, validate: Validate | None = None) -> Finished:
        """Train, or go on where the run folder's newest checkpoint is, and keep the best checkpoint.

        Args:
            validate: instead of the ranking of validation examples.
        """
        config, data, comm = self.config, self.data, self.comm
        record.write_json("plan.json", describe(self.plan, self.comm.world_size // config.distributed.replicas))
        ranks = validate is None
        valid = _sample(self.scope.splits.valid, config.train.eval_users, config.train.seed)
        encode = self.encoder(valid)
        if validate is None:

            def validate(check: Callable[[], None]) -> dict[str, float]:
                return evaluate_heads(data, valid, encode.checked(check), comm, config.eval)

        record.say(
            f"{data.schema.name}: {data.schema.users} users, {data.schema.items} items, {self.scope.learnt_from}"
            f" events to learn from; {comm.world_size} {'ranks' if comm.world_size > 1 else 'rank'} on"
            f" {comm.device.type}"
        )
        torch.manual_seed(config.train.seed + comm.rank)  # from here on dropout, which ranks draw apart
        tuned = self.loaded is not None
        checkpoints = Checkpoints(Path(config.train.run), self.model, self.optimizer, comm, data.fingerprint)
        progress = self.resume(checkpoints, record) if record.resumed else Progress()
        checkpoints.check_space()
        finished = fit(
            self.model, self.optimizer, self.loader, config.train, comm, record, validate, checkpoints, progress, tuned
        )
        record.say(
            f"{finished.steps} steps in {finished.seconds:.0f} s;"
            f" best {config.train.select} {finished.best:.4f} at step {finished.best_step}"
        )
        if ranks and config.model.fusion == "sum":
            self._weigh_heads(valid, encode, record, checkpoints)
        return finished

    def resume(self, checkpoints: Checkpoints, record: Record) -> Progress:
        """Load the newest state that is whole, and forget what was recorded after it."""
        checkpoints.tidy()
        found = checkpoints.restore()
        if found is None:
            record.say("no checkpoint yet: starting anew")
            record.rewind(-1)
            return Progress()
        progress, damaged, told = found
        for line in told:
            record.say(f"not used: {line}")
        checkpoints.put_aside(damaged)
        record.say(f"resuming after step {progress.step}")
        record.rewind(progress.step)
        return progress

    def _weigh_heads(self, valid: Examples, encode: ModelEncoder, record: Record, checkpoints: Checkpoints) -> None:
        """Put the fusion's weights that rank validation best into the best checkpoint."""
        config = self.config
        meta = load_checkpoint(checkpoints.best, self.model, self.comm)
        trained = [name for name in HEADS if getattr(config.loss, name) > 0]
        blocks = blocks_of(config.eval)
        metric = config.train.select.partition("/")[2]
        weights, score = choose_weights(self.data, valid, encode, self.comm, blocks, trained, metric)
        self.model.module.dense.tower.fusion.set_weights(weights)
        named = dict(zip(HEADS, weights.tolist(), strict=True))
        checkpoints.save_best({**meta, "fusion": named})
        record.say(f"fusion weights {named}: validation fused/{metric} {score:.4f}")


def _sample(examples: Examples, most: int, seed: int) -> Examples:
    return examples.take(sampled(len(examples), most, seed)) if most else examples
