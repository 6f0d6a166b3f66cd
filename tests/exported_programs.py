"""Programs of one form are traced once a test process: `torch.export.export` takes seconds, whatever the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from flm_torchrec.export.tower.programs import ContentProgram, UserProgram


class Traced:
    """Calls `export` for the first program of each form. Another program of that form gets the same graph with its own
    weights. A form is all that a program has but the values of its weights and buffers.
    """

    def __init__(self, export: Callable[..., ExportedProgram]) -> None:
        self.export = export
        self.known: dict[Any, ExportedProgram] = {}

    def __call__(self, program: nn.Module, arguments: tuple[Tensor, ...], **options: Any) -> ExportedProgram:
        """As `torch.export.export`; programs that are not of the packaged tower are traced each time."""
        if not isinstance(program, UserProgram | ContentProgram):
            return self.export(program, arguments, **options)
        values = program.state_dict()
        form = (_settings(program), _shapes(values.items()), _shapes(enumerate(arguments)), repr(options))
        if form not in self.known:
            self.known[form] = self.export(program, arguments, **options)
        exported = self.known[form]
        for name, value in values.items():
            held = value.detach().clone()
            old = exported.state_dict[name]
            exported.state_dict[name] = nn.Parameter(held, False) if isinstance(old, nn.Parameter) else held
        return exported


def _settings(program: nn.Module) -> tuple[Any, ...]:
    """Of each layer: its name, its class, and all attributes that are neither layers nor tensors."""
    return tuple(
        (name, type(layer), *((key, repr(value)) for key, value in sorted(vars(layer).items()) if key[0] != "_"))
        for name, layer in program.named_modules()
    )


def _shapes(tensors: Any) -> tuple[Any, ...]:
    return tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors)


def keep_traces(patch: Any) -> None:
    """Trace programs of one form once from now on."""
    patch.setattr(torch.export, "export", Traced(torch.export.export))
