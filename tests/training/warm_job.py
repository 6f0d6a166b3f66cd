"""Run by test_warm_start as one rank or several: start from a run, and save the state before any step.

Arguments: folder to save to, and overrides of the run's config, `train.warm_start` among them.
"""

from __future__ import annotations

import sys
from pathlib import Path

from flm_torchrec.training.checkpoint.manager import Checkpoints, Progress
from flm_torchrec.training.job import open_job
from flm_torchrec.training.logger import RunLogger
from flm_torchrec.training.warm_start import WarmStart, warm_config


def main(target: str, source: str, overrides: list[str]) -> None:
    config = warm_config(Path(source), [f"train.warm_start={source}", f"train.run={target}", *overrides])
    with open_job(config) as job:
        checkpoints = Checkpoints(Path(target), job.model, job.optimizer, job.comm, job.data.fingerprint)
        with RunLogger(None, 0) as logger:
            steps = WarmStart.of(job).load(job, checkpoints, logger)
        checkpoints.save(Progress(steps_before=steps))
        checkpoints.finish()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
