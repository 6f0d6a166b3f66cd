"""Whether all ranks were given the same settings, data and code; asked before they do anything together."""

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
"""Settings that ranks may have each for itself: hosts differ. The kind of device in use is compared instead."""
READ_BY_RANK_0 = ("distributed.plan", "distributed.constraints")
"""Files that rank 0 alone reads: it matters whether they are given, not where they lie on a host."""
BY_CONTENT = ("data.path", "finetune.source")
"""Folders that each rank reads: a copy anywhere will do, so their content is compared instead."""
PACKAGES = ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "numpy")
MOST_TOLD = 3


@dataclass(frozen=True)
class Given:
    """What one rank was given, as text, and the folder it was read from: folders may differ."""

    value: str
    folder: str = field(default="", compare=False)

    def __str__(self) -> str:
        return f"{self.value} ({self.folder})" if self.folder else self.value


def check_alike(comm: Comm, config: Config, more: Mapping[str, Given]) -> None:
    """Compare what the ranks were given; collective.

    Args:
        more: what was given beside the config, by name: options, digests of folders.

    Raises:
        ConfigError: on every rank, the same line: what differs, with its values and ranks.
    """
    if comm.world_size == 1:
        return
    plain = {**_settings(config), "kind of device": comm.device.type, **_code()}
    given = {**{name: Given(value) for name, value in plain.items()}, **more}
    if told := differences(comm.gather(given)):
        raise ConfigError(f"ranks were not given the same: {told}; start all ranks with the same settings, data, code")


def differences(given: Sequence[Mapping[str, Given]]) -> str:
    """What differs between ranks, by name with each value and its ranks; empty if nothing does."""
    names = dict.fromkeys(name for one in given for name in one)
    told = []
    for name in names:
        ranks: dict[Given, list[int]] = defaultdict(list)
        for rank, one in enumerate(given):
            ranks[one.get(name, Given("not given"))].append(rank)
        if len(ranks) > 1:
            told.append(f"{name} is {_values(ranks)}")
    rest = len(told) - MOST_TOLD
    return ", and ".join(told[:MOST_TOLD]) + (f", and {rest} more" if rest > 0 else "")


def digest_of(*files: Path) -> str:
    """Of the files' content, wherever they lie; one that is not there counts as empty."""
    whole = hashlib.sha256()
    for file in files:
        content = file.read_bytes() if file.is_file() else b""
        whole.update(len(content).to_bytes(8, "little") + content)
    return whole.hexdigest()


def _values(ranks: Mapping[Given, list[int]]) -> str:
    """The rarest value first, which is likely the wrong one."""
    rarest = sorted(ranks.items(), key=lambda found: (len(found[1]), -found[1][0]))
    shown = [f"{value} on rank {_ranks(on)}" for value, on in rarest[:2]]
    rest = len(rarest) - 2
    return ", ".join(shown) + (f", {rest} more values on others" if rest > 0 else "")


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(str(rank) for rank in ranks[:4])
    return shown if len(ranks) <= 4 else f"{shown} and {len(ranks) - 4} more"


def _settings(config: Config) -> dict[str, str]:
    found = {}
    for section, content in asdict(config).items():
        for name, value in content.items():
            key = f"{section}.{name}"
            if key in READ_BY_RANK_0:
                found[key] = "given" if value else "not given"
            elif key not in FREE and key not in BY_CONTENT:
                found[key] = str(value)
    return found


def _code() -> dict[str, str]:
    """The package's sources, whether or not a version was given to them, and what the numbers come from."""
    package = Path(__file__).parents[1]
    sources = sorted(package.rglob("*.py"))
    names = hashlib.sha256("\n".join(str(file.relative_to(package)) for file in sources).encode()).hexdigest()
    found = {"code of flm_torchrec": f"{names[:4]}{digest_of(*sources)[:8]}", "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
