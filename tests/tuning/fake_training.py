"""A training that takes no time, for tests of searches; as a script, a search that is killed in the middle.

python fake_training.py SPACE OUTPUT VALIDATIONS    # the search kills itself when so many have been written
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from math import log10
from pathlib import Path

from flm_torchrec.config import load_config
from flm_torchrec.tuning import trial
from flm_torchrec.tuning.space import read_space
from flm_torchrec.tuning.study import TuneOptions, tune

VALIDATIONS = 4
SPACE = """
settings: {data.path: none, model.layers: 1}
space:
  train.sparse_lr: {low: 1e-3, high: 10, log: true}
  model.dim: [16, 32]
"""


class FakeTraining:
    """Has one more validation at each look, and goes on with those of its folder. Best at a rate of 0.1."""

    def __init__(self, command: list[str], log: Path, seen: Callable[[FakeTraining], None] = lambda _: None) -> None:
        assert command[1:5] == ["-m", "flm_torchrec", "train", "--config"]
        self.config = load_config(command[5])
        assert self.config.train.existing == "resume"
        self.file = Path(self.config.train.run) / "metrics.jsonl"
        self.file.parent.mkdir(exist_ok=True)
        self.file.touch()
        self.log, self.seen = log, seen
        self.code: int | None = None

    def poll(self) -> int | None:
        """Write a validation, or end after the last one."""
        if self.code is None:
            done = len(self.file.read_text().splitlines())
            value = 0.5 - 0.1 * abs(log10(self.config.train.sparse_lr) + 1) + 0.01 * done
            if done == VALIDATIONS:
                self.code = 0
            else:
                with self.file.open("a") as file:
                    file.write(json.dumps({"step": done, "valid/fused/ndcg@10": value}) + "\n")
            self.seen(self)
        return self.code

    def send_signal(self, number: int) -> None:
        """Save and end, as a training does."""
        assert number == signal.SIGTERM
        self.code = 75

    def kill(self) -> None:
        """Not asked for."""
        raise AssertionError("killed")


def main() -> None:
    """See the top of the file."""
    space, output, count = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    trial.POLL = 0.0

    def seen(_: FakeTraining) -> None:
        if sum(len(file.read_text().splitlines()) for file in output.glob("*/metrics.jsonl")) == count:
            os.kill(os.getpid(), signal.SIGKILL)

    tune(read_space(space), TuneOptions(output, 5, 2, launch=lambda c, log: FakeTraining(c, log, seen)), print)


if __name__ == "__main__":
    main()
