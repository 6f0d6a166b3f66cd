"""A finished run, loaded again for evaluation and export, on any number of ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flm_torchrec.errors import RunError
from flm_torchrec.folders import CONFIG
from flm_torchrec.training.by_key import know_learned
from flm_torchrec.training.checkpoint.manager import BEST, load_checkpoint
from flm_torchrec.training.checkpoint.storage import read_meta
from flm_torchrec.training.follow.growth import followed_data
from flm_torchrec.training.identity import open_run
from flm_torchrec.training.job import Job, open_inputs
from flm_torchrec.training.run_events import ANY_RANKS, IN_MEMORY, load_data


@dataclass(frozen=True)
class Restored:
    """A run's best model with the data it was trained on."""

    job: Job
    version: str
    """Run name, step and a digest of its config: an export names with it the model that it was made of."""


@contextmanager
def restore(
    run: str | Path, overrides: Sequence[str] = (), sample: bool = False, options: Mapping[str, str] | None = None
) -> Iterator[Restored]:
    """Load a run's best checkpoint onto the ranks of this job; collective.

    The data of a run of 'flm follow' are those that it began with and all that it learned from.

    Args:
        run: run folder.
        overrides: of the run's config, such as `distributed.device=cpu`, or `data.path`, where its data are now; none
            that changes what was trained.
        options: options of the command, which all ranks must have been given alike.
        sample: load only the events of the users whom a run with `data.stream` validated on.

    Raises:
        ConfigError: the ranks were not given the same.
        RunError: no run, no checkpoint, data that are not its own, or a sample of a run that had all data in memory.
    """
    run = Path(run)
    config = open_run(run, [*ANY_RANKS, *([] if sample else [IN_MEMORY]), *overrides])
    if sample and (not config.data.stream or config.finetune.source):
        raise RunError(f"{run}: was not pretrained with data.stream; give --sample a number of users")
    if config.finetune.task == "label" and config.finetune.source:
        raise RunError(f"{run}: was fine-tuned to tell labels, not to rank; its test metrics are in finetune.json")
    taken = read_meta(run / BEST).get("taken")
    data = load_data(config, on_disk=True)
    if taken:
        data = followed_data(run, data, taken)
    with open_inputs(config, data, run=run, options=options) as inputs:
        job = Job(inputs, learns=False)
        meta = load_checkpoint(run / BEST, job.model, inputs.comm)
        know_learned(job)
        digest = hashlib.sha256((run / CONFIG).read_bytes()).hexdigest()[:8]
        yield Restored(job=job, version=f"{run.name}-{meta['step']}-{digest}")
