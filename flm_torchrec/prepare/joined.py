"""The joint data of a run: made once, whichever of its processes comes first, and taken again while nothing changed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from flm_torchrec.claim import InUse, claim
from flm_torchrec.errors import DataError
from flm_torchrec.folders import SCHEMA
from flm_torchrec.prepare.join import Joining, made_of, read_domains
from flm_torchrec.prepare.join_features import Domain, joint_features
from flm_torchrec.prepare.memory import memory_bytes

POLL = 0.5
"""Seconds between looks at whether another process has finished."""


def join_once(folders: Sequence[str | Path], output: Path, replace: bool = False) -> None:
    """Make the joint data of these folders, unless they are there already. Each process of a job may call it.

    Args:
        replace: replace joint data of other folders.

    Raises:
        DataError: the folders cannot be joined, or the output holds something else.
    """
    domains = read_domains(folders)
    features = joint_features(domains, ())
    while not _is_there(domains, output, replace):
        with suppress(InUse), claim(output):
            if not _is_there(domains, output, replace):
                Joining(domains, features, (), memory_bytes("")).write_to(output)
            return
        time.sleep(POLL)


def _is_there(domains: Sequence[Domain], output: Path, replace: bool) -> bool:
    """Whether the output is the joint data of these domains; False where it may be written.

    Raises:
        DataError: the output holds something else that must not be replaced.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    if not (output / SCHEMA).is_file():
        raise DataError(f"{output}: exists and holds no prepared data, so it is not replaced; give another --train.run")
    found = made_of(output)
    if found == {domain.name: domain.fingerprint for domain in domains}:
        return True
    if found and replace:
        return False
    names = ", ".join(str(domain.folder) for domain in domains)
    raise DataError(
        f"{output}: was not made of what {names} hold now; go on with the data it was made of, give another"
        " --train.run, or start anew with --train.existing replace"
    )
