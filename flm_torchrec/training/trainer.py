"""Training as a whole: check, open, run the loop, keep the best model and the weights of its fusion."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flm_torchrec import products
from flm_torchrec.config import Config
from flm_torchrec.config.heads import FUSED, HEADS, REPRESENTATIONS
from flm_torchrec.data.splits import sampled
from flm_torchrec.errors import ConfigError
from flm_torchrec.evaluation.evaluate import blocks_of, evaluate_heads
from flm_torchrec.evaluation.ranking import RankingProblem
from flm_torchrec.model import pointwise_attention, token_passes
from flm_torchrec.model.losses import PRECISIONS
from flm_torchrec.model.pretrain import PretrainModel
from flm_torchrec.model.softmax import why_pytorch
from flm_torchrec.names import nearest
from flm_torchrec.planner.plan_file import describe
from flm_torchrec.training.by_key import know_learned
from flm_torchrec.training.checkpoint.manager import Checkpoints, Progress, load_checkpoint, states_of
from flm_torchrec.training.checkpoint.storage import read_meta
from flm_torchrec.training.encoder import ModelEncoder
from flm_torchrec.training.fusion_weights import FORMS, choose_fusion
from flm_torchrec.training.job import Job, open_inputs
from flm_torchrec.training.learned_before import refuse_learned
from flm_torchrec.training.logger import RunLogger
from flm_torchrec.training.loop import Finished, TrainingParts, Validate, run_loop
from flm_torchrec.training.run_folder import check_run_folder, claimed, open_run_folder
from flm_torchrec.training.shortlists import LONG, SHORT, items_for
from flm_torchrec.training.trackers import check_trackers
from flm_torchrec.training.warm_start import WarmStart, check_source

CHOSEN_LATE = ("late", "sum")
"""Fusions that are chosen on validation."""
DOMAINS = {"own": "its own domain", "all": "all domains"}
"""By `loss.domains`, whose items are candidates."""
MOST_EXAMPLES = 16_384
"""Maximum of validation examples that choose a fusion, with the shortest lists: 30 MB of scores."""


def pretrain(config: Config) -> Finished:
    """Train one run; collective. Leaves the run folder `config.train.run` with the best checkpoint in it.

    Raises:
        FlmError: config, data or run folder is wrong; before anything is written where that can be known.
    """
    if config.finetune.source:
        raise ConfigError("finetune.source: is set; 'flm train' pretrains, fine-tune with 'flm finetune'")
    check_select(config)
    check_trackers(config.train.trackers)
    if config.train.warm_start:
        check_source(config)
    with open_inputs(config) as inputs, claimed(config.train.run, inputs.comm):
        resumes = check_run_folder(config, inputs.comm) and bool(states_of(Path(config.train.run)))
        if config.train.warm_start and not resumes:
            refuse_learned(Path(config.train.warm_start), inputs)
        job = Job(inputs)
        start = WarmStart.of(job) if config.train.warm_start and not resumes else None
        with open_run_folder(config, inputs.data, inputs.comm, job.total_steps) as logger:
            return train(job, logger, start=start)


def check_select(config: Config) -> None:
    """Raise ConfigError where `train.select` is no metric that validation will have."""
    metrics = ["mrr", *(f"{m}@{k}" for m in ("hr", "ndcg") for k in config.eval.ks)]
    known = [f"{head}/{metric}" for head in REPRESENTATIONS for metric in metrics]
    if config.train.select not in known:
        raise ConfigError(
            f"train.select: no validation metric '{config.train.select}'; {nearest(config.train.select, known)}"
        )
    head, _, metric = config.train.select.partition("/")
    if config.model.fusion in CHOSEN_LATE and items_for(metric) > LONG:
        raise ConfigError(
            f"train.select: {metric} is too deep to choose model.fusion={config.model.fusion} by; select by a K up to"
            f" {LONG // 2}"
        )
    if head != FUSED and getattr(config.loss, head) == 0:
        raise ConfigError(f"train.select: the {head} head is not trained; set loss.{head}, or select by another head")
    if config.model.fusion not in CHOSEN_LATE and config.loss.fused == 0:
        raise ConfigError(f"loss.fused is 0, so nothing trains model.fusion={config.model.fusion}; set one of the two")


def train(job: Job, logger: RunLogger, validate: Validate | None = None, start: WarmStart | None = None) -> Finished:
    """Train a job, or resume from the run folder's newest checkpoint, and keep the best checkpoint; collective.

    Args:
        validate: instead of ranking the validation examples. Without it a late or a summed fusion is chosen on these
            examples at each validation.
        start: another run's state to begin with, instead of new weights.

    Raises:
        RunError: no checkpoint can be written or resumed from, or the loss is not a number.
        Interrupted: asked to stop; the state is saved.
    """
    config, data, comm = job.config, job.data, job.comm
    logger.write_json("plan.json", describe(job.plan, comm.world_size // config.distributed.replicas))
    valid = job.events.splits.valid.drawn(config.train.eval_users, config.train.seed)
    encoder = job.encoder(valid)

    def rank_validation(check: Callable[[], None]) -> dict[str, float]:
        checked = encoder.checked(check)
        # The checkpoint is selected by the fusion that it will have.
        tried = _set_fusion(job, checked) if config.model.fusion in CHOSEN_LATE else {}
        return evaluate_heads(data, valid, checked, comm, config.eval) | tried

    logger.say(
        f"{data.schema.name}: {data.schema.users} users, {data.schema.items} items, {job.events.training_events}"
        f" events to learn from; {comm.world_size} {'ranks' if comm.world_size > 1 else 'rank'} on"
        f" {comm.device.type}"
    )
    for line in _made_by_pytorch(config, data.schema.items, comm.device):
        logger.say(line)
    if data.item_domain is not None:
        sizes = zip(data.schema.domains, np.bincount(data.item_domain), strict=True)
        told = "; ".join(f"{name}: {count} items" for name, count in sizes)
        logger.say(f"{told}; a target is told from the items of {DOMAINS[config.loss.domains]}")
    torch.manual_seed(config.train.seed + comm.rank)  # from here on dropout, which each rank draws for itself
    checkpoints = Checkpoints(Path(config.train.run), job.model, job.optimizer, comm, data.fingerprint)
    progress = resume(checkpoints, logger) if logger.resumed else Progress()
    if start is not None:
        progress.steps_before = start.load(job, checkpoints, logger)
    know_learned(job)
    checkpoints.check_space()
    chosen = (lambda: {}) if validate else (lambda: _fusion(job))
    parts = TrainingParts(job.model, job.optimizer, job.loader, config.train, comm, logger, checkpoints, chosen)
    # An untrained content head compares features, and few users may teach it nothing better.
    first = bool(config.finetune.source) or start is not None
    finished = run_loop(parts, validate or rank_validation, progress, validate_first=first)
    logger.say(
        f"{finished.steps} steps in {finished.seconds:.0f} s;"
        f" best {config.train.select} {finished.best:.4f} at step {finished.best_step}"
    )
    best = read_meta(checkpoints.best)
    weights = {f"fusion/{head}": weight for head, weight in best.get("fusion", {}).items()}
    logger.best(best["step"], {**best["valid"], **weights})
    if validate is None and config.model.fusion in CHOSEN_LATE:
        logger.say(_told_fusion(load_checkpoint(checkpoints.best, job.model, comm), config.train.select))
    return finished


def _made_by_pytorch(config: Config, items: int, device: torch.device) -> Iterator[str]:
    """A line for each part that native code or kernels should make, and PyTorch makes."""
    candidates = items if config.loss.negatives == "all" else config.loss.negatives
    if reason := why_pytorch(candidates, config.model.dim, PRECISIONS[config.loss.precision], device):
        yield f"softmax by PyTorch, which is slower than native code: {reason}"
    if config.model.block == "hstu" and config.model.layers and (reason := pointwise_attention.why_not_native(device)):
        yield f"attention by PyTorch, which is slower than native code: {reason}"
    if reason := token_passes.why_not_native(device):
        yield f"passes over tokens by PyTorch, which is slower than native code: {reason}"
    if reason := products.why_not_native(device):
        yield f"products of float32 by PyTorch, which is slower than native code: {reason}"


def resume(checkpoints: Checkpoints, logger: RunLogger) -> Progress:
    """Load the newest complete state, and drop what was logged after it; collective.

    Raises:
        RunError: all states are damaged, or the state is of other data or does not fit the model.
    """
    checkpoints.tidy()
    restored = checkpoints.restore()
    if restored is None:
        logger.say("no checkpoint yet: starting anew")
        logger.rewind(-1)
        return Progress()
    progress, damaged, reasons = restored
    for reason in reasons:
        logger.say(f"not used: {reason}")
    checkpoints.put_aside(damaged)
    logger.say(f"resuming after step {progress.step}")
    logger.rewind(progress.step)
    return progress


def _fusion(job: Job) -> dict[str, Any]:
    """The weights of the heads by name, and the mixture if one scores; nothing of a fusion that is learned."""
    fusion = job.model.module.tower.fusion
    if job.config.model.fusion not in CHOSEN_LATE:
        return {}
    weights = {head: round(weight, 3) for head, weight in zip(HEADS, fusion.scale.flatten().tolist(), strict=True)}
    mixture = fusion.mixture()
    return {"fusion": weights, **({} if mixture is None else {"mixture": asdict(mixture)})}


def _told_fusion(best: dict[str, Any], select: str) -> str:
    """The fusion of the best checkpoint, in a line.

    Args:
        best: what the checkpoint says of itself.
    """
    metric = select.partition("/")[2]
    values = {form: best["valid"].get(f"{form}/{metric}") for form in FORMS}
    tried = [f"{form.replace('_', ' ')} {value:.4f}" for form, value in values.items() if value is not None]
    name = "mixture" if "mixture" in best else "weighted sum"
    return f"fusion: {name}; weights {best['fusion']}; validation {metric}: {', '.join(tried)}"


def _set_fusion(job: Job, encoder: ModelEncoder) -> dict[str, float]:
    """Choose the fusion that ranks the encoder's examples best, and set it; the metrics of those tried. Collective."""
    examples = encoder.examples
    most = MOST_EXAMPLES * SHORT // items_for(job.config.train.select)
    examples = examples.take(sampled(len(examples), most, job.config.train.seed))
    problem = RankingProblem(job.data, examples, blocks_of(job.config.eval))
    model: PretrainModel = job.model.module
    chosen = choose_fusion(problem, encoder.of(examples), model.temperatures(), job.comm, job.config)
    model.set_fusion(torch.tensor(chosen.weights), chosen.mixture)
    return chosen.tried
