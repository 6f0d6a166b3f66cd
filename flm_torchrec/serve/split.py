"""Shares of users: which of several exports answers a user. The draw is a hash, so every process draws the same."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path
from typing import TypeVar

from flm_torchrec.errors import RunError

Asked = TypeVar("Asked")
Group = TypeVar("Group")
Answer = TypeVar("Answer")


def draw(salt: str, unit: str) -> float:
    """A number of 0 … 1, always the same for a unit, and evenly spread over units. Another salt draws anew."""
    digest = blake2b(f"{salt}\0{unit}".encode("utf-8", "replace"), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / (1 << 53)  # as many bits as a float has


@dataclass(frozen=True)
class Split:
    """Shares that add up to 1. A unit, such as a user, is always in the same one."""

    shares: tuple[float, ...]
    salt: str = ""

    def of(self, unit: str) -> int:
        """Number of the share that a unit is in."""
        place = draw(self.salt, unit)
        return next((n for n, end in enumerate(accumulate(self.shares)) if place < end), len(self.shares) - 1)


def read_split(text: str | None, exports: int, salt: str = "") -> Split:
    """The shares of `--split`, percents with slashes such as 90/10; None: equal ones.

    Raises:
        RunError: they are no numbers above 0, not as many as exports, or do not add up to 100.
    """
    if text is None:
        return Split((1 / exports,) * exports, salt)
    try:
        shares = [float(part) for part in text.split("/")]
    except ValueError as error:
        raise RunError(f"--split '{text}': write percents with slashes, such as 90/10") from error
    if len(shares) != exports:
        raise RunError(f"--split {text}: has {len(shares)} shares, and --export names {exports}; give one for each")
    if not all(share > 0 for share in shares) or abs(sum(shares) - 100) > 1e-6:
        raise RunError(f"--split {text}: give percents above 0 that add up to 100")
    return Split(tuple(share / 100 for share in shares), salt)


def export_name(export: Path) -> str:
    """The last part of the path given, which a link keeps whatever it points to."""
    return Path(os.path.abspath(export)).name


def check_names(exports: Sequence[Path]) -> None:
    """Raise RunError where two exports have the same name."""
    names = [export_name(export) for export in exports]
    twice = sorted(name for name in set(names) if names.count(name) > 1)
    if twice:
        raise RunError(f"--export: two are named '{twice[0]}'; give folders, or links to them, of different names")


def apart(
    asked: Sequence[Asked], groups: Sequence[Group], answer: Callable[[Group, list[Asked]], Sequence[Answer]]
) -> list[Answer]:
    """Answers in the order of `asked`, where the requests of each group are answered together."""
    different = dict.fromkeys(groups)
    if len(different) == 1:
        return list(answer(groups[0], list(asked)))
    found: dict[int, Answer] = {}
    for group in different:
        places = [n for n, other in enumerate(groups) if other == group]
        found |= dict(zip(places, answer(group, [asked[n] for n in places]), strict=True))
    return [found[n] for n in range(len(asked))]
