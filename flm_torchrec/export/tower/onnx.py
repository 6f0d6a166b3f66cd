"""The user tower as ONNX, made of the packaged program: for servers that have no PyTorch.

ONNX holds the program and its tables. Not in it: how events become its inputs (`tower.json` describes them), the last
events of known users (`histories.parquet`), content vectors of new items and users, and the items to be scored.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch

from flm_torchrec.errors import ConfigError, RunError
from flm_torchrec.export.tower.layout import ONNX, USER
from flm_torchrec.export.tower.programs import UserInputs
from flm_torchrec.safe_text import first_line

OUTPUTS = ("representations", "weights")
"""[B, heads + 1, S] in the order of REPRESENTATIONS, and the heads' weights in the fusion [B, heads]."""
NEEDED = ("onnx", "onnxscript")


def check_onnx() -> None:
    """Raise ConfigError where a package that writes ONNX is not installed."""
    for name in NEEDED:
        if find_spec(name) is None:
            raise ConfigError(f"ONNX: {name} is not installed; run: pip install {name}, or export without --onnx")


def write_onnx(tower: Path) -> list[str]:
    """Write `user.onnx` from `user.pt2` in a tower's folder → names of the files written: a second one above 2 GiB.

    Inputs are the fields of `UserInputs` that the program takes, by name; batch, length and number of added items are
    free.

    Raises:
        ConfigError: a package that writes ONNX is not installed.
        RunError: ONNX has no operator for a part of the tower.
    """
    check_onnx()
    program = torch.export.load(tower / USER)
    names = UserInputs._fields[: len(program.graph_signature.user_inputs)]
    try:
        with warnings.catch_warnings(), _quiet("torch.onnx"):
            warnings.simplefilter("ignore")
            made = torch.onnx.export(program, (), input_names=names, output_names=OUTPUTS, dynamo=True, verbose=False)
    except (torch.onnx.errors.OnnxExporterError, RuntimeError, ValueError) as error:
        reason = f"ONNX does not hold the tower ({first_line(error)}); export without --onnx"
        raise RunError(f"{tower / ONNX}: {reason}") from error
    assert made is not None
    made.save(tower / ONNX)
    return sorted(file.name for file in tower.glob(f"{ONNX}*"))


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Drop the warnings of a logger: torch.onnx tells each package that it could use besides."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
