"""Fine-tuning: a pretrained run → the same model for a new task, a new cohort or a new domain, with its control."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from flm_torchrec.config import Config, load_config
from flm_torchrec.data.splits import Examples
from flm_torchrec.data.weights import label_weights
from flm_torchrec.errors import ConfigError, RunError
from flm_torchrec.evaluation.evaluate import evaluate_heads
from flm_torchrec.files import telling, write_text
from flm_torchrec.folders import CONFIG
from flm_torchrec.training.by_key import know_learned, load_source
from flm_torchrec.training.checkpoint.manager import BEST, load_checkpoint
from flm_torchrec.training.identity import check_has_model, open_run, refuse_forgotten
from flm_torchrec.training.job import Job, JobInputs, open_inputs
from flm_torchrec.training.label_evaluation import evaluate_labels
from flm_torchrec.training.learned_before import refuse_learned
from flm_torchrec.training.run_events import ANY_RANKS
from flm_torchrec.training.run_folder import ANOTHER_RUN, check_run_folder, claimed, open_run_folder
from flm_torchrec.training.trackers import check_trackers
from flm_torchrec.training.trainer import check_select, train

LABEL_SELECT = "label/auc"
NOT_GIVEN = {
    "finetune.start": "each training has its own, first pretrained, then scratch, which --no-control leaves out",
    "train.warm_start": "fine-tuning goes on from finetune.source",
}
"""Settings of a training that fine-tuning sets itself."""


def source_config(source: Path, overrides: list[str]) -> Config:
    """The source's config with overrides.

    Three settings have other defaults than in pretraining: `train.select` follows the task, `train.existing` is
    "refuse", and `data.path` is where the source's own data are.

    Raises:
        FlmError: the source is no finished run, its own data are not there any more, or a setting is wrong.
    """
    check_has_model(source)
    given = {o.partition("=")[0] for o in overrides}
    for name, reason in NOT_GIVEN.items():
        if name in given:
            raise ConfigError(f"--{name}: {reason}; leave it out")
    if "train.run" not in given:
        raise ConfigError("--train.run: name the folder to write, beside that of the source")
    task = load_config(source / CONFIG, overrides).finetune.task
    select = [f"train.select={LABEL_SELECT}"] if task == "label" and "train.select" not in given else []
    settings = ["train.existing=refuse", "train.warm_start=", *ANY_RANKS, *overrides, *select]
    if "data.path" not in given:
        return open_run(source, settings)
    config = load_config(source / CONFIG, settings)
    refuse_forgotten(source, Path(config.data.path))
    return config


def finetune(
    config: Config, control: bool, sample: int = 0, options: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Fine-tune into RUN/pretrained and, as a control, train the same from new weights into RUN/scratch; collective.

    The best checkpoint is chosen on validation.

    Args:
        sample: rank only so many test users, the same ones before and after each training; 0: all.
        options: options of the command, which all ranks must have been given alike.

    Returns, on rank 0, the content of RUN/finetune.json. `test` has test metrics by the weights that training started
    from; under `found` are those of the source before any step, where the source can do the task. `ranked` says for how
    many of the test users, where the task is to rank.

    Raises:
        FlmError: config, data or run folder is wrong; before anything is written where that can be known.
    """
    root = Path(config.train.run)
    if root.resolve() == Path(config.finetune.source).resolve():
        raise RunError(f"{root}: is the source itself; give another --train.run")
    tuning = config.finetune
    if sample and tuning.task == "label":
        raise ConfigError("--sample: users are ranked for the next item, and not to tell labels; leave it out")
    check_trackers(config.train.trackers)
    _check_select(config)
    runs = _trainings(config, control)
    test: dict[str, Any] = {}
    with open_inputs(config, options=options) as inputs, claimed(root, inputs.comm):
        everyone = inputs.events.splits.test
        tested = everyone.drawn(sample)
        for run in runs:
            check_run_folder(run, inputs.comm)
        if tuning.task == "next-item":
            refuse_learned(Path(tuning.source), inputs)
        for run in runs:
            test |= _finetune_once(JobInputs.of(run, inputs.data, inputs.comm), tested)
        if not inputs.comm.main:
            return {}
        done: dict[str, Any] = {"ranked": {"users": tested.users, "of": everyone.users}}
        if tuning.task == "label":
            done = {"labels": list(label_weights(tuning.labels))}
        report = {"task": tuning.task, **done, "share": tuning.share, "test": test}
        with telling(root, ANOTHER_RUN):
            write_text(root / "finetune.json", json.dumps(report, indent=2))
    return report


def _trainings(config: Config, control: bool) -> list[Config]:
    """The config of each training, in a folder of its own."""
    root = Path(config.train.run)
    starts: tuple[Literal["pretrained", "scratch"], ...] = ("pretrained", "scratch") if control else ("pretrained",)
    return [
        replace(
            config,
            train=replace(config.train, run=str(root / start)),
            finetune=replace(config.finetune, start=start),
        )
        for start in starts
    ]


def _check_select(config: Config) -> None:
    if config.finetune.task == "next-item":
        check_select(config)
        return
    names = list(label_weights(config.finetune.labels))
    known = [LABEL_SELECT, *(f"label/{name}/auc" for name in names if len(names) > 1)]
    if config.train.select not in known:
        raise ConfigError(f"train.select: no label metric '{config.train.select}'; choose of {', '.join(known)}")


def _finetune_once(inputs: JobInputs, tested: Examples) -> dict[str, dict[str, float]]:
    """Train into the run folder of the inputs' config; test metrics by the weights that training started from.

    Args:
        tested: what is ranked, where the task is to rank.
    """
    config, data, comm = inputs.config, inputs.data, inputs.comm
    job = Job(inputs)
    job.loaded = load_source(job)
    know_learned(job)
    labels = job.events.labels

    def test_metrics() -> dict[str, float]:
        if labels is not None:
            return evaluate_labels(job, labels.test)
        return evaluate_heads(data, tested, job.encoder(tested), comm, config.eval)

    with claimed(config.train.run, comm), open_run_folder(config, data, comm, job.total_steps) as logger:
        logger.say(f"{config.finetune.task} from {config.finetune.start} weights")
        for line in (job.loaded or "all new").splitlines():
            logger.say(line)
        test = {"found": test_metrics()} if job.loaded and labels is None else {}
        train(job, logger, None if labels is None else partial(evaluate_labels, job, labels.valid))
        load_checkpoint(Path(config.train.run) / BEST, job.model, comm)
        test[config.finetune.start] = test_metrics()
        for start, metrics in test.items():
            logger.scalars(job.total_steps, {f"test/{start}/{name}": value for name, value in metrics.items()})
    return test
