"""Shared by the tests of the server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from flm_torchrec.export.tower.reader import PackagedTower


@pytest.fixture(scope="session")
def tower(exported: Path) -> PackagedTower:
    return PackagedTower(exported)


@pytest.fixture(scope="module")
def one_tower(tower: PackagedTower) -> Iterator[None]:
    """Copies of `exported` are loaded with the one tower: reading its programs takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flm_torchrec.serve.loaded_export.PackagedTower", lambda *_: tower)
        yield
