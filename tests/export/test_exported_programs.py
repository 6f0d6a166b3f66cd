"""The tests trace and read a program once; others of its form, or of its file, have weights of their own."""

from __future__ import annotations

from pathlib import Path

import torch

from flm_torchrec.export.tower.programs import ContentProgram, PackagedTable, Precision
from flm_torchrec.model.heads import mlp
from tests.exported_programs import Loaded, Traced


def test_programs_of_one_form_share_a_graph_and_no_weight() -> None:
    traced: list[torch.nn.Module] = []

    def export(program: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> torch.export.ExportedProgram:
        traced.append(program)
        return unwrapped(program, arguments)

    unwrapped = torch.export.export
    if isinstance(unwrapped, Traced):
        unwrapped = unwrapped.export
    once = Traced(export)
    given = torch.tensor([[[0, 1]], [[2, -1]]]), torch.randn(2, 3)

    def check(precision: Precision, seed: int) -> None:
        torch.manual_seed(seed)
        program = ContentProgram(mlp(7, 4), PackagedTable([torch.randn(3, 4)], 3, 4, precision), [0])
        program.eval().requires_grad_(False)
        torch.testing.assert_close(once(program, given).module()(*given), program(*given))

    check("fp32", 1)
    check("fp32", 2)
    assert len(traced) == 1
    check("int8", 2)
    assert len(traced) == 2


def test_a_file_is_read_once_and_who_gets_it_has_weights_of_its_own(tmp_path: Path) -> None:
    read: list[Path] = []

    def load(file: Path) -> torch.export.ExportedProgram:
        read.append(file)
        return unwrapped(file)

    given_load = torch.export.load
    unwrapped = given_load.load if isinstance(given_load, Loaded) else given_load
    once, files = Loaded(load), [tmp_path / name for name in ("one.pt2", "same.pt2", "other.pt2")]
    one, other = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    pairs = list(zip(files, (one, one, other), strict=True))
    for file, layer in pairs:
        torch.export.save(torch.export.export(layer, (torch.ones(1, 2),)), file)
    files[1].write_bytes(files[0].read_bytes())
    first = once(files[0])
    first.state_dict["weight"].data.fill_(7.0)
    given = torch.randn(1, 2)
    for file, layer in pairs:
        torch.testing.assert_close(once(file).module()(given), layer(given))
    assert (first.state_dict["weight"] == 7.0).all() and read == [files[0], files[2]]
