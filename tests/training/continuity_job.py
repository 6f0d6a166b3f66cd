"""Run by test_continuity as ranks: start a run again, with nothing new.

Arguments: a command of flm; or `state` and a run of 'flm train', whose newest state is loaded and saved again.
"""

from __future__ import annotations

import sys
from pathlib import Path

from flm_torchrec.cli import main as flm
from flm_torchrec.config import load_config
from flm_torchrec.training.checkpoint.manager import Checkpoints
from flm_torchrec.training.job import open_job
from flm_torchrec.training.run_events import ANY_RANKS


def main(command: list[str]) -> None:
    if command[0] == "state":
        save_again(Path(command[1]))
    else:
        assert flm(command) == 0


def save_again(run: Path) -> None:
    with open_job(load_config(run / "config.yaml", ANY_RANKS)) as job:
        checkpoints = Checkpoints(run, job.model, job.optimizer, job.comm, job.data.fingerprint)
        found = checkpoints.restore()
        assert found is not None and found[1] == []
        checkpoints.save(found[0])
        checkpoints.finish()


if __name__ == "__main__":
    main(sys.argv[1:])
