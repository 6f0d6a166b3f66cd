"""Fine-tuning: a pretrained run → the same model for a new task, a new cohort or a new domain, with its control."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from flm_torchrec.config import Config, load_config
from flm_torchrec.data.dataset import PreparedData
from flm_torchrec.distributed.comm import Comm, process_group
from flm_torchrec.errors import ConfigError, RunError
from flm_torchrec.evaluation.evaluate import evaluate_heads
from flm_torchrec.files import telling, write_text
from flm_torchrec.training.checkpoint.manager import BEST, load_checkpoint
from flm_torchrec.training.given import check_given
from flm_torchrec.training.identity import check_has_model, open_run, refuse_forgotten
from flm_torchrec.training.label_metrics import label_metrics
from flm_torchrec.training.run_folder import ANOTHER_RUN, check_run_folder, claimed, open_run_folder
from flm_torchrec.training.scope import ANY_RANKS, IN_MEMORY, load_data, scope_of
from flm_torchrec.training.trainer import Job, check_select

LABEL_SELECT = "label/auc"


def source_config(source: Path, overrides: list[str]) -> Config:
    """The source's config with overrides.

    What chooses the checkpoint follows the task, and a folder that exists is refused, unless they are given. Without
    `data.path` the data are the source's own.

    Raises:
        FlmError: the source is no finished run, its own data are not there any more, or a setting is wrong.
    """
    check_has_model(source)
    given = {o.partition("=")[0] for o in overrides}
    if "train.run" not in given:
        raise ConfigError("--train.run: name the folder to write, beside that of the source")
    task = load_config(source / "config.yaml", [IN_MEMORY, *overrides]).finetune.task
    select = [f"train.select={LABEL_SELECT}"] if task == "label" and "train.select" not in given else []
    own = ["train.existing=refuse", IN_MEMORY, *ANY_RANKS]
    settings = [*own, *overrides, *select]
    if "data.path" not in given:
        return open_run(source, settings)
    config = load_config(source / "config.yaml", settings)
    refuse_forgotten(source, Path(config.data.path))
    return config


def finetune(config: Config, control: bool) -> dict[str, Any]:
    """Fine-tune into RUN/pretrained and, as a control, train the same from new weights into RUN/scratch; collective.

    Returns, on rank 0, test metrics by first weights, and as `found` those of the source before any step where it can
    do the task; written to RUN/finetune.json too. The checkpoint is chosen on validation.

    Raises:
        FlmError: config, data or run folder is wrong; before anything is written where that can be known.
    """
    root = Path(config.train.run)
    if root.resolve() == Path(config.finetune.source).resolve():
        raise RunError(f"{root}: is the source itself; give another --train.run")
    starts: tuple[Literal["pretrained", "scratch"], ...] = ("pretrained", "scratch") if control else ("pretrained",)
    runs = [
        replace(
            config,
            train=replace(config.train, run=str(root / start)),
            finetune=replace(config.finetune, start=start),
        )
        for start in starts
    ]
    for run in runs:
        _check(run)
    data = load_data(config)
    found: dict[str, Any] = {}
    with ExitStack() as stack:
        comm = stack.enter_context(process_group(config.distributed))
        check_given(comm, config, data)
        stack.enter_context(claimed(root, comm))
        for run in runs:
            check_run_folder(run, comm)
        for run in runs:
            found |= _one(run, data, comm)
        if comm.main:
            report = {"task": config.finetune.task, "share": config.finetune.share, "test": found}
            with telling(root, ANOTHER_RUN):
                write_text(root / "finetune.json", json.dumps(report, indent=2))
    return found if comm.main else {}


def _check(config: Config) -> None:
    if config.finetune.task == "next-item":
        check_select(config)
    elif config.train.select != LABEL_SELECT:
        raise ConfigError(f"train.select: no label metric '{config.train.select}'; the one there is: {LABEL_SELECT}")


def _one(config: Config, data: PreparedData, comm: Comm) -> dict[str, dict[str, float]]:
    job = Job(config, data, scope_of(config, data), comm)
    job.take_over()
    labels, splits = job.scope.labels, job.scope.splits

    def measure(part: Literal["valid", "test"], check: Callable[[], None] = lambda: None) -> dict[str, float]:
        if labels is None:
            examples = getattr(splits, part)
            return evaluate_heads(data, examples, job.encoder(examples), comm, config.eval)
        shape = (config.train.batch_size, config.data.max_history)
        return label_metrics(job.model, data, getattr(labels, part), job.scope.known, comm, *shape, check)

    with claimed(config.train.run, comm), open_run_folder(config, data, comm, job.total_steps) as record:
        record.say(f"{config.finetune.task} from {config.finetune.start} weights; {job.loaded or 'all new'}")
        if job.loaded and not job.same_tables:
            record.say(f"{data.path} holds other data than {config.finetune.source} was made with: tables begin anew")
        found = {"found": measure("test")} if job.loaded and labels is None else {}
        job.fit(record, None if labels is None else lambda check: measure("valid", check))
        load_checkpoint(Path(config.train.run) / BEST, job.model, comm)
        found[config.finetune.start] = measure("test")
        for start, test in found.items():
            record.scalars(job.total_steps, {f"test/{start}/{name}": value for name, value in test.items()})
    return found
