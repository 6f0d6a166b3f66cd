"""The compiled user program: made once on a machine, used where it fits, else told once with the same answers."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from flm_torchrec import machine_code
from flm_torchrec.cli import main
from flm_torchrec.errors import RunError
from flm_torchrec.export.tower import compiled
from flm_torchrec.export.tower.compiled import (
    cache_folder,
    compile_program,
    compile_tower,
    load_compiled,
    program_key,
    why_not,
)
from flm_torchrec.export.tower.reader import PackagedTower, TowerQuery


class Small(nn.Module):
    """Rows of a table through a layer: what a user program is made of."""

    size: Tensor

    def __init__(self, rows: int, seed: int, factor: float = 2.0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layer = nn.Linear(4, 3)
        self.tables = nn.ModuleDict({"item_id": nn.Embedding(rows, 4)})
        self.factor = factor
        self.register_buffer("size", torch.tensor(rows))

    def forward(self, ids: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.tables["item_id"](torch.minimum(ids, self.size - 1))
        return self.factor * self.layer(rows) * scale[:, None, None], rows.sum(1)


def saved(folder: Path, module: Small) -> Path:
    """An export whose user program is this module's."""
    (folder / "tower").mkdir(parents=True)
    shapes = {0: Dim("batch", min=1), 1: Dim("length", min=1, max=7)}
    module.eval().requires_grad_(False)
    given = torch.zeros(3, 5, dtype=torch.int64), torch.ones(3)
    program = torch.export.export(module, given, dynamic_shapes=(shapes, {0: shapes[0]}), strict=False)
    torch.export.save(program, folder / "tower" / "user.pt2")
    return folder


def read(export: Path) -> ExportedProgram:
    return torch.export.load(export / "tower" / "user.pt2")


class GraphRunner:
    """Takes the arguments that native code takes, and runs the graph."""

    def __init__(self, program: ExportedProgram) -> None:
        self.program = program

    def run(self, arguments: Sequence[Tensor]) -> list[Tensor]:
        return list(self.program.graph_module(*arguments))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def small_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("small") / "export", Small(9, seed=1))


@pytest.fixture(scope="module")
def program(small_export: Path) -> ExportedProgram:
    return read(small_export)


@pytest.fixture
def code(program: ExportedProgram, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a program that is compiled, but for the compiler's work."""
    monkeypatch.setattr(compiled, "_compiled", lambda program: b"native code")
    assert "compiled for this machine" in compile_program(program)
    return next(cache_folder().glob("*.so"))


def agree(one: Any, other: Any, rows: int) -> None:
    for batch, length in ((1, 1), (2, 7), (5, 3)):
        given = torch.randint(0, rows + 2, (batch, length)), torch.rand(batch)
        with torch.inference_mode():
            for a, b in zip(one(*given), other(*given), strict=True):
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_programs_share_code_whatever_their_weights_and_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [
        program_key(read(saved(tmp_path / name, module)))
        for name, module in (
            ("one", Small(9, seed=1)),
            ("trained again, more items", Small(12, seed=2)),
            ("computes something else", Small(9, seed=1, factor=3.0)),
        )
    ]
    assert keys[0] == keys[1] != keys[2]
    monkeypatch.setattr(compiled, "OPTIONS", {"cpp.threads": 2})
    assert program_key(read(tmp_path / "one")) != keys[0]  # compiled in another way


def test_code_is_made_once_and_gets_weights_and_tables_of_each_export(
    code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "_compiled", lambda program: pytest.fail("compiled twice"))
    other = saved(tmp_path / "other", Small(30, seed=2))
    assert "compiled already" in compile_tower(other)
    program = read(other)
    monkeypatch.setattr(compiled, "_runner", lambda code: GraphRunner(program))
    module = program.module()
    function, reason = load_compiled(program, module)
    assert function is not None and not reason
    agree(function, module, 30)
    assert sorted(file.suffix for file in cache_folder().iterdir()) == [".json", ".so"]
    assert all(file.stat().st_mode & 0o077 == 0 for file in cache_folder().iterdir())
    assert [file.name for file in other.rglob("*") if file.is_file()] == ["user.pt2"]  # no native code in an export


def change(record: Path, **fields: str) -> None:
    record.write_text(json.dumps({**json.loads(record.read_text()), **fields}))


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda code: change(code.with_suffix(".json"), **{"version of PyTorch": "2.0.0"}), "another version"),
        (lambda code: change(code.with_suffix(".json"), processor="0" * 64), "another processor"),
        (lambda code: change(code.with_suffix(".json"), machine="Darwin arm64"), "another machine"),
        (lambda code: code.write_bytes(b"native"), "damaged"),
        (lambda code: code.with_suffix(".json").write_text("[]"), "another version"),
        (lambda code: code.with_suffix(".json").write_bytes(b"\xff{"), "cannot be read"),
        (lambda code: code.with_suffix(".json").unlink(), "cannot be read"),
        (lambda code: os.chmod(code, 0o666), "written by others"),
        (lambda code: os.chmod(code.parent, 0o777), "written by others"),
    ],
)
def test_code_that_does_not_fit_is_never_loaded(
    program: ExportedProgram, code: Path, monkeypatch: pytest.MonkeyPatch, spoil: Any, why: str
) -> None:
    spoil(code)
    monkeypatch.setattr(compiled, "_runner", lambda code: pytest.fail("loaded"))
    function, reason = load_compiled(program, nn.Module())
    assert function is None and why in reason and "\n" not in reason
    compile_program(program)  # again, in its place
    assert not why_not(code)


def test_instructions_of_the_processor_count(code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "cpuinfo"
    text.write_text("processor : 0\nflags\t: avx avx2\ncpu MHz : 1\n")
    monkeypatch.setattr(machine_code, "CPU_INFO", text)
    older = compiled.machine()
    text.write_text("processor : 0\nflags\t: avx2 avx\ncpu MHz : 2\n")
    assert compiled.machine() == older  # the same ones, in another order
    text.write_text("processor : 0\nflags\t: avx avx2 amx_bf16\ncpu MHz : 1\n")
    assert compiled.machine() != older
    assert why_not(code) == "it was compiled for another processor"
    text.write_text("processor : 0\nBogoMIPS : 50\nFeatures\t: fp ASIMD\n")
    assert machine_code.processor_instructions() == {"fp", "asimd"}
    text.write_text("model : 0\ncpu MHz : 1\n")
    unknown = compiled.machine()
    text.write_text("model : 0\ncpu MHz : 2\n")
    assert machine_code.processor_instructions() == set() and compiled.machine() == unknown


def test_where_nothing_was_compiled_nothing_is_told(program: ExportedProgram) -> None:
    assert load_compiled(program, program.module()) == (None, "")


def test_code_that_cannot_be_loaded_is_a_reason(program: ExportedProgram, code: Path) -> None:
    function, reason = load_compiled(program, program.module())  # no shared object
    assert function is None and reason.startswith("it cannot be loaded") and "\n" not in reason


def test_without_a_compiler_one_line_says_so(
    small_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(program: ExportedProgram) -> bytes:
        raise RuntimeError("No working C++ compiler found\nin /usr/bin")

    monkeypatch.setattr(compiled, "_compiled", fail)
    line = compile_tower(small_export)
    assert "not compiled (No working C++ compiler found" in line and "portable" in line and "\n" not in line
    assert not list(cache_folder().iterdir())
    with pytest.raises(RunError, match="flm export --tower"):
        compile_tower(tmp_path)


def test_a_tower_uses_code_that_gives_its_vectors(
    exported: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("flm_torchrec.export.tower.reader.load_compiled", lambda *_: (None, "it is damaged"))
    tower = PackagedTower(exported)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and "it is damaged" in told[0] and "portable" in told[0]
    queries = [TowerQuery(tower.known_history(user), user) for user in range(3)]
    added, program, calls = np.zeros((0, tower.dim), np.float32), tower.user, []
    before = tower.represent(queries, added)

    def wrong(*given: Tensor) -> Sequence[Tensor]:
        heads, weights = program(*given)
        return heads + 0.01, weights

    def failing(*given: Tensor) -> Sequence[Tensor]:
        raise RuntimeError("run_func_ failed\nat line 3")

    def right(*given: Tensor) -> Sequence[Tensor]:
        calls.append(given)
        return program(*given)

    assert tower._use(wrong) == "it gives other vectors" and tower._use(failing).startswith("it fails")
    assert tower.user is program and not tower.compiled
    assert tower._use(right) == "" and tower.compiled
    calls.clear()
    after = tower.represent(queries, added)
    assert len(calls) == 1
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one.heads, other.heads)


def test_options_that_leave_nothing_to_compile_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["export", "--run", str(tmp_path), "--output", str(tmp_path / "e"), "--compile", "--tower", "none"]
    assert main(command) == 2
    assert "--compile: compiles the tower of a complete export" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("rows", [9, 200])
def test_native_code_gives_the_same_at_any_size(tmp_path: Path, rows: int) -> None:
    one, other = saved(tmp_path / "one", Small(9, seed=1)), saved(tmp_path / "other", Small(rows, seed=2))
    assert "compiled for this machine" in compile_tower(one)
    program = read(other)
    module = program.module()
    function, reason = load_compiled(program, module)
    assert function is not None, reason
    agree(function, module, rows)


@pytest.mark.slow
def test_a_compiled_tower_gives_the_vectors_of_the_portable_one(exported: Path) -> None:
    portable = PackagedTower(exported)
    assert "compiled for this machine" in compile_tower(exported)
    tower = PackagedTower(exported)
    assert tower.compiled and not portable.compiled
    rng = np.random.default_rng(0)
    for batch, longest in ((1, 1), (2, tower.max_history), (64, tower.max_history), (7, 3)):
        given = tower._made_up(rng, batch, longest)
        with torch.inference_mode():
            for one, two in zip(tower.user(*given), portable.user(*given), strict=True):
                torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
