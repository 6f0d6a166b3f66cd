"""Pretrain: the script that `torchx run dist.ddp -j 2x8 flm_torchrec/train.py -- --config FILE` launches.

`flm train` calls the same function. Called in Python, this module is `flm_torchrec.api.run.train`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from flm_torchrec.callable_module import make_callable
from flm_torchrec.cli import main

if __name__ != "__main__":
    make_callable(__name__, "flm_torchrec.api.run")


def script_arguments(argv: Sequence[str]) -> list[str]:
    """The options, without what a launcher puts before them: the path of this script, and `--`."""
    rest = list(argv)
    if rest and Path(rest[0]).name == Path(__file__).name:
        rest.pop(0)
    if rest and rest[0] == "--":
        rest.pop(0)
    return rest


if __name__ == "__main__":
    sys.exit(main(["train", *script_arguments(sys.argv[1:])]))
