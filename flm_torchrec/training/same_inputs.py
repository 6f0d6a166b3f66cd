"""Whether the ranks of a job were given the same settings, data, runs to read, and code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from flm_torchrec.config import Config
from flm_torchrec.data.dataset import PreparedData
from flm_torchrec.distributed.alike import Given, check_alike, digest_of
from flm_torchrec.distributed.comm import Comm
from flm_torchrec.folders import CONFIG
from flm_torchrec.training.checkpoint.manager import BEST
from flm_torchrec.training.checkpoint.storage import SUMS


def check_same_inputs(
    comm: Comm, config: Config, data: PreparedData, run: Path | None = None, options: Mapping[str, str] | None = None
) -> None:
    """Raise unless all ranks were given the same, before any size can differ between them; collective.

    Folders may lie elsewhere on each host if their content is the same.

    Args:
        run: finished run that all ranks read.
        options: options of the command, beside the config.

    Raises:
        ConfigError: on every rank, with what differs, its values and the ranks that have them.
    """
    inputs = {name: Given(value) for name, value in (options or {}).items()}
    inputs["data"] = Given(data.fingerprint[:12], str(data.path))
    sources = (("finetune.source", config.finetune.source), ("train.warm_start", config.train.warm_start))
    for name, folder in (("the run", run), *sources):
        if folder:
            best = Path(folder) / BEST
            inputs[name] = Given(digest_of(Path(folder) / CONFIG, best / SUMS)[:12], str(folder))
    check_alike(comm, config, inputs)
