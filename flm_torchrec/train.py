"""Pretrain: the script that `torchx run dist.ddp -j 2x8 flm_torchrec/train.py -- --config FILE` launches.

`flm train` calls the same function.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from flm_torchrec.cli import main


def script_arguments(argv: Sequence[str]) -> list[str]:
    """Arguments without the path of this script, which a launcher may pass on as the first of them."""
    return list(argv[1:] if argv and Path(argv[0]).name == Path(__file__).name else argv)


if __name__ == "__main__":
    sys.exit(main(["train", *script_arguments(sys.argv[1:])]))
