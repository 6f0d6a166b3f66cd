"""The tests trace a program once; another program of its form gives its own vectors, not the first one's."""

from __future__ import annotations

import torch

from flm_torchrec.export.tower.programs import ContentProgram, PackagedTable, Precision
from flm_torchrec.model.heads import mlp
from tests.exported_programs import Traced


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
