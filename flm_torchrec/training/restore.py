"""A finished run, brought back for evaluation and export at any number of ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flm_torchrec.distributed.comm import process_group
from flm_torchrec.errors import RunError
from flm_torchrec.training.checkpoint.manager import BEST, load_checkpoint
from flm_torchrec.training.given import check_given
from flm_torchrec.training.identity import open_run
from flm_torchrec.training.scope import ANY_RANKS, IN_MEMORY, load_data, scope_of
from flm_torchrec.training.trainer import Job


@dataclass(frozen=True)
class Restored:
    """A run's best model with the data it was trained on."""

    job: Job
    version: str
    """Run name, step and a digest of its config: which model made an export."""


@contextmanager
def restore(
    run: str | Path, overrides: Sequence[str] = (), sample: bool = False, options: Mapping[str, str] | None = None
) -> Iterator[Restored]:
    """Load a run's best checkpoint onto the ranks of this job; collective.

    Args:
        run: run folder.
        overrides: of the run's config, such as `distributed.device=cpu`, or `data.path`, where its data are now; none
            that changes what was trained.
        options: of the command that asks, which all ranks must have been given alike.
        sample: load the events of those users alone that a run with `data.stream` validated on.

    Raises:
        ConfigError: ranks were not given the same.
        RunError: no run, no checkpoint, data that are not its own, or a sample of a run that had all data in memory.
    """
    run = Path(run)
    config = open_run(run, [*ANY_RANKS, *([] if sample else [IN_MEMORY]), *overrides])
    if sample and not config.data.stream:
        raise RunError(f"{run}: was trained with all data in memory; --sample is for runs with data.stream")
    if config.finetune.task == "label" and config.finetune.source:
        raise RunError(f"{run}: was fine-tuned to tell labels, not to rank; its test metrics are in finetune.json")
    data = load_data(config)
    scope = scope_of(config, data)
    with process_group(config.distributed) as comm:
        check_given(comm, config, data, run, options)
        job = Job(config, data, scope, comm)
        meta = load_checkpoint(run / BEST, job.model, comm)
        digest = hashlib.sha256((run / "config.yaml").read_bytes()).hexdigest()[:8]
        yield Restored(
            job=job,
            version=f"{run.name}-{meta['step']}-{digest}",
        )
