"""A test process traces programs of one form once, whatever the weights, and reads a file of a program once: each takes
seconds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from flm_torchrec.export.tower.programs import ContentProgram, UserProgram
from flm_torchrec.files import sha256


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
            exported.state_dict[name] = _copied(value, exported.state_dict[name])
        return exported


class Loaded:
    """Calls `load` for the first file of each content. Later ones get the same graph with weights of their own, which
    they may change.
    """

    def __init__(self, load: Callable[[Path], ExportedProgram]) -> None:
        self.load = load
        self.known: dict[str, ExportedProgram] = {}

    def __call__(self, file: Path) -> ExportedProgram:
        """As `torch.export.load`."""
        content = sha256(file)
        if content not in self.known:
            self.known[content] = self.load(file)
        program = copy.copy(self.known[content])
        program._state_dict = {name: _copied(value, value) for name, value in program.state_dict.items()}
        return program


def _copied(value: Tensor, like: Tensor) -> Tensor:
    """The value, as a parameter where `like` is one."""
    held = value.detach().clone()
    return nn.Parameter(held, False) if isinstance(like, nn.Parameter) else held


def _settings(program: nn.Module) -> tuple[Any, ...]:
    """Of each layer: its name, its class, and all attributes that are neither layers nor tensors."""
    return tuple(
        (name, type(layer), *((key, repr(value)) for key, value in sorted(vars(layer).items()) if key[0] != "_"))
        for name, layer in program.named_modules()
    )


def _shapes(tensors: Any) -> tuple[Any, ...]:
    return tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors)


def keep_traces(patch: Any) -> None:
    """Trace programs of one form once, and read each file of one once, from now on."""
    patch.setattr(torch.export, "export", Traced(torch.export.export))
    patch.setattr(torch.export, "load", Loaded(torch.export.load))
