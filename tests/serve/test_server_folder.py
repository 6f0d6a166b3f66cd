"""Arrays of an export that processes share, and the folder of a server that is not left behind."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flm_torchrec.config.heads import REPRESENTATIONS
from flm_torchrec.data.history import NO_EVENTS
from flm_torchrec.errors import RunError
from flm_torchrec.export.manifest import FILE
from flm_torchrec.export.mapped import IN_MEMORY, MappedFiles
from flm_torchrec.export.parts import ExportRows
from flm_torchrec.export.tower.reader import TowerQuery
from flm_torchrec.serve.loaded_export import LoadedExport, load_export
from flm_torchrec.serve.server_folder import LOCK, METRICS, PREFIX, SharedExports, server_folder

ARRAYS = st.lists(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=20), min_size=1, max_size=4)


def forbidden() -> Any:
    raise AssertionError("made again")


@settings(max_examples=30)
@given(ARRAYS, st.lists(st.none() | st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=3)))
def test_what_one_process_makes_the_next_one_maps(
    tmp_path_factory: pytest.TempPathFactory, given: list[list[int]], texts: list[list[str] | None]
) -> None:
    mapped = MappedFiles(tmp_path_factory.mktemp("mapped"))
    arrays = [np.array(numbers, np.int64) for numbers in given]
    table = pa.table({"a": pa.array(texts, pa.list_(pa.string())), "b": pa.array(range(len(texts)))})
    makes: list[Callable[[], Any]] = [lambda: arrays, forbidden]
    for make in makes:
        for found, want in zip(mapped.arrays("numbers", len(arrays), make), arrays, strict=True):
            np.testing.assert_array_equal(found, want)
    for again in (lambda: table, forbidden):
        assert mapped.table("texts", again).equals(table)
    assert IN_MEMORY.arrays("numbers", len(arrays), lambda: arrays) == arrays


def test_what_cannot_be_written_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: Path, arr: np.ndarray, allow_pickle: bool) -> None:
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    mapped = MappedFiles(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("flm_torchrec.export.mapped.np.save", full)
        with pytest.raises(RunError, match="No space left on device; set TMPDIR"):
            mapped.array("numbers", lambda: np.arange(3))
    assert list(tmp_path.iterdir()) == []
    assert mapped.array("numbers", lambda: np.arange(3)).tolist() == [0, 1, 2]


def answers(loaded: LoadedExport) -> list[Any]:
    """What a loaded export says: representations, items and their attributes, by several ways."""
    users = [key for key in loaded.user_of][:5]
    rows = [loaded.user_of[key] for key in users]
    found = loaded.represent([TowerQuery(loaded.tower.known_history(row), row) for row in rows])
    value = loaded.catalogue.attributes["genre"].values[0].as_py()
    best = [
        loaded.best(loaded.query(one, head), 9, NO_EVENTS.item, wanted)
        for one in found
        for head in REPRESENTATIONS
        for wanted in ({}, {"genre": [value]})
    ]
    shown = [(loaded.key(row), loaded.title(row), loaded.attributes(row)) for row in range(loaded.size)]
    return [users, best, shown, loaded.seen.take(pa.array(rows)).to_pylist(), loaded.catalogue.search("a", 5)]


def test_a_mapped_export_answers_as_one_in_memory(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = SharedExports(tmp_path)
    first, alone = load_export(exported, 1, shared), load_export(exported, 1)
    assert answers(first) == answers(alone)
    with monkeypatch.context() as patch:
        for name in ("table", "vectors", "parts"):
            patch.setattr(ExportRows, name, lambda *_: forbidden())
        second = load_export(exported, 2, shared)
    assert answers(second) == answers(alone)
    maps = Path("/proc/self/maps").read_text()
    (files,) = (folder for folder in tmp_path.iterdir() if folder.is_dir())
    wanted = ("items.arrow", "users.arrow", "histories.arrow", "items.faiss", "user-keys.0.npy", "groups.0.npy")
    assert all(str(files / name) in maps for name in wanted)


def test_arrays_of_an_export_stay_while_a_process_has_it(exported: Path, tmp_path: Path) -> None:
    shared, other = SharedExports(tmp_path / "shared"), tmp_path / "other"
    (tmp_path / "shared").mkdir()
    shutil.copytree(exported, other)
    (other / FILE).write_text((other / FILE).read_text().replace('"model_version": "one"', '"model_version": "two"'))
    one = load_export(exported, 1, shared)
    before = answers(one)
    two = load_export(other, 2, shared)
    assert {one.mapped.folder, two.mapped.folder} == {f for f in (tmp_path / "shared").iterdir() if f.is_dir()}
    assert answers(one) == before
    gone = one.mapped.folder
    assert one.mapped.held is not None
    one.mapped.held.close()  # as at the end of its process
    load_export(other, 3, shared)
    assert gone is not None and not gone.exists() and two.mapped.folder is not None and two.mapped.folder.exists()


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_folders_of_killed_servers_go_and_others_stay(temporary: Path) -> None:
    killed, running, foreign = (temporary / f"{PREFIX}{name}" for name in ("killed", "running", "foreign"))
    for folder in (killed, running, foreign):
        (folder / METRICS).mkdir(parents=True)
    (killed / LOCK).touch()
    with (running / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with server_folder() as folder:
            assert {f.name for f in temporary.iterdir()} == {running.name, foreign.name, folder.name}
            with server_folder() as another:  # one of another server
                assert folder.exists() and another != folder
        assert {f.name for f in temporary.iterdir()} == {running.name, foreign.name}
