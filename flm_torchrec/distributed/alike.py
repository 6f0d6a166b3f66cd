"""Check that all ranks have the same settings, data and code, before they do anything together."""

from __future__ import annotations

import hashlib
import platform
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

from flm_torchrec.config import Config
from flm_torchrec.distributed.comm import Comm
from flm_torchrec.errors import ConfigError

FREE = ("distributed.threads", "distributed.device")
"""Settings that may differ, because hosts differ. The kind of device in use is compared instead."""
READ_BY_RANK_0 = ("distributed.plan", "distributed.constraints")
"""Files that only rank 0 reads: what counts is whether they are given, not their path on a host."""
BY_CONTENT = ("data.path", "finetune.source", "train.warm_start")
"""Folders that each rank reads. Copies may have any path, so their content is compared instead."""
PACKAGES = ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "numpy")
MOST_REPORTED = 3
"""Differences that an error names."""


@dataclass(frozen=True)
class Given:
    """One value of one rank as text, and the folder from which the rank read it, which may differ."""

    value: str
    folder: str = field(default="", compare=False)

    def __str__(self) -> str:
        return f"{self.value} ({self.folder})" if self.folder else self.value


def check_alike(comm: Comm, config: Config, more: Mapping[str, Given]) -> None:
    """Compare config, code and other values of all ranks. Collective.

    Args:
        more: values beside the config, by name, such as options and digests of folders.

    Raises:
        ConfigError: on every rank, with the same line, which names each difference, its values and ranks.
    """
    if comm.world_size == 1:
        return
    plain = {**_settings(config), "kind of device": comm.device.type, **_code()}
    given = {**{name: Given(value) for name, value in plain.items()}, **more}
    if differing := differences(comm.gather(given)):
        raise ConfigError(
            f"ranks were not given the same: {differing}; start all ranks with the same settings, data, code"
        )


def differences(given: Sequence[Mapping[str, Given]]) -> str:
    """What differs between ranks, as text: each name with its values and their ranks; empty if nothing does."""
    names = dict.fromkeys(name for one in given for name in one)
    differing = []
    for name in names:
        ranks: dict[Given, list[int]] = defaultdict(list)
        for rank, one in enumerate(given):
            ranks[one.get(name, Given("not given"))].append(rank)
        if len(ranks) > 1:
            differing.append(f"{name} is {_values(ranks)}")
    rest = len(differing) - MOST_REPORTED
    return ", and ".join(differing[:MOST_REPORTED]) + (f", and {rest} more" if rest > 0 else "")


def digest_of(*files: Path) -> str:
    """SHA-256 of the content of files, without their paths; a missing file counts as empty."""
    digest = hashlib.sha256()
    for file in files:
        content = file.read_bytes() if file.is_file() else b""
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


def _values(ranks: Mapping[Given, list[int]]) -> str:
    """The two rarest values, the rarest first: it is likely the wrong one."""
    rarest = sorted(ranks.items(), key=lambda value_ranks: (len(value_ranks[1]), -value_ranks[1][0]))
    shown = [f"{value} on rank {_ranks(on)}" for value, on in rarest[:2]]
    rest = len(rarest) - 2
    return ", ".join(shown) + (f", {rest} more values on others" if rest > 0 else "")


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(str(rank) for rank in ranks[:4])
    return shown if len(ranks) <= 4 else f"{shown} and {len(ranks) - 4} more"


def _settings(config: Config) -> dict[str, str]:
    settings = {}
    for section, content in asdict(config).items():
        for name, value in content.items():
            key = f"{section}.{name}"
            if key in READ_BY_RANK_0:
                settings[key] = "given" if value else "not given"
            elif key not in FREE and key not in BY_CONTENT:
                settings[key] = str(value)
    return settings


def _code() -> dict[str, str]:
    """A digest of the package's sources, and the versions of Python and of the packages that compute the numbers."""
    package = Path(__file__).parents[1]
    sources = sorted(package.rglob("*.py"))
    names = hashlib.sha256("\n".join(str(file.relative_to(package)) for file in sources).encode()).hexdigest()
    versions = {"code of flm_torchrec": f"{names[:4]}{digest_of(*sources)[:8]}", "python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions
