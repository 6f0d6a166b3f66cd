"""The user program as native code of this machine, compiled by AOTInductor and kept in the user's cache.

The code has neither weights nor tables: these are its arguments. So it has nothing of a user, and all exports whose
programs differ in weights and sizes of tables alone share it. No export has native code inside: what is downloaded
or copied from another machine is never run as such. Only code that was compiled here is loaded: by the same version
of PyTorch, on a processor with the same instructions, by this user.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind

from flm_torchrec.claim import claim
from flm_torchrec.documents import MOST_JSON_BYTES, Unreadable, parse_json, read_text
from flm_torchrec.errors import RunError
from flm_torchrec.export.tower.layout import FOLDER, USER
from flm_torchrec.files import make_parent, replacing_file, sha256, telling
from flm_torchrec.machine_code import code_folder, open_to_others, processor_instructions
from flm_torchrec.safe_text import first_line

CALLS = 4
"""Calls that may run at once; more wait."""
TABLES = "tables."
"""Beginning of the names of the tensors that have a row for each item, user, kind of event or gap."""
WITHOUT = "start without --compile"
OPTIONS = {"aot_inductor.compile_wrapper_opt_level": "O0", "cpp.threads": 1}
"""The wrapper only calls the kernels, and -O1 takes as long for it as the kernels take. One thread: else the code would
use as many as the process that compiles it, wherever it runs, while a server answers several requests at once."""
UserFunction = Callable[..., Sequence[Tensor]]


@dataclass(frozen=True)
class Argument:
    """An argument of a program's graph: an input, a parameter or a table."""

    target: str | None
    """Name of the parameter or buffer; None: an input."""
    dtype: str
    shape: tuple[int | None, ...]
    """None where any size is possible."""


def arguments_of(program: ExportedProgram) -> list[Argument]:
    """The arguments of a program's graph, in order."""
    found = []
    for node, spec in zip(_placeholders(program), program.graph_signature.input_specs, strict=True):
        value = node.meta["val"]
        shape = [None if isinstance(size, torch.SymInt) else int(size) for size in value.shape]
        target = None if spec.kind == InputKind.USER_INPUT else str(spec.target)
        if target is not None and target.startswith(TABLES) and shape and (shape[0] or 0) > 1:
            shape[0] = None
        found.append(Argument(target, str(value.dtype), tuple(shape)))
    return found


def program_key(program: ExportedProgram) -> str:
    """Digest of what a program computes and how it is compiled, without its weights and the sizes of its tables."""
    arguments = [[a.target, a.dtype, a.shape] for a in arguments_of(program)]
    return hashlib.sha256(json.dumps([program.graph_module.code, arguments, OPTIONS]).encode()).hexdigest()[:32]


def machine() -> dict[str, str]:
    """What compiled code needs: a version of PyTorch, a kind of machine, and the instructions of its processor."""
    instructions = " ".join(sorted(processor_instructions())) or platform.processor()
    capability = torch.backends.cpu.get_cpu_capability()
    return {
        "version of PyTorch": torch.__version__,
        "machine": f"{platform.system()} {platform.machine()}",
        "processor": hashlib.sha256(f"{capability} {instructions}".encode()).hexdigest(),
    }


def cache_folder() -> Path:
    """Where compiled programs are: `flm_torchrec/towers` in `$XDG_CACHE_HOME`, by default `~/.cache`."""
    return code_folder("towers")


def compile_tower(export: Path) -> str:
    """Compile the user program of an export for this machine, unless that was done before; one line about it.

    It takes about a minute of processor time. Where it cannot be compiled the line says why: the portable program
    gives the same answers.

    Raises:
        RunError: there is no such program, or the cache cannot be written.
        InUse: another process compiles it.
    """
    file = export / FOLDER / USER
    if not file.is_file():
        raise RunError(f"{file}: not found; make the export with 'flm export --tower int8'")
    return f"{file}: {compile_program(torch.export.load(file))}"


def compile_program(program: ExportedProgram) -> str:
    """As of `compile_tower`: what was done."""
    code = cache_folder() / f"{program_key(program)}.so"
    with telling(code, WITHOUT):
        make_parent(code)
        code.parent.chmod(0o700)
    with claim(code, WITHOUT):
        if not why_not(code):
            return f"is compiled already, {code}"
        begin = time.monotonic()
        try:
            made = _compiled(program)
        except (RuntimeError, OSError, ValueError, NotImplementedError) as error:
            return f"not compiled ({first_line(error)}); the portable program is used, which is slower"
        _keep(code, made)
    return f"compiled for this machine in {time.monotonic() - begin:.0f} s, {code}"


def _keep(code: Path, made: bytes) -> None:
    """Write the code and its record, which their owner alone may read."""
    record = {**machine(), "sha256": hashlib.sha256(made).hexdigest()}
    with telling(code, WITHOUT):
        for target, content in ((code, made), (_record(code), json.dumps(record).encode())):
            with replacing_file(target) as fresh:
                fresh.write_bytes(content)
            target.chmod(0o600)


def why_not(code: Path) -> str:
    """Why compiled code is not loaded here, such as that there is none; empty: it can be."""
    try:
        record = parse_json(read_text(_record(code), MOST_JSON_BYTES))
        for path in (code.parent, code, _record(code)):
            if open_to_others(path):
                return f"{path} may be written by others"
        there = record if isinstance(record, dict) else {}
        for name, here in machine().items():
            if there.get(name) != here:
                return f"it was compiled for another {name}"
        if there.get("sha256") != sha256(code):
            return "it is damaged"
    except FileNotFoundError:
        return "it is not there"
    except (Unreadable, OSError) as error:
        return f"it cannot be read: {first_line(error)}"
    return ""


def load_compiled(program: ExportedProgram, module: nn.Module) -> tuple[UserFunction | None, str]:
    """The compiled code of a program over a module's weights and tables; or why it is not used, if it was compiled.

    Args:
        module: of the program; the code shares the memory of its tensors.
    """
    code = cache_folder() / f"{program_key(program)}.so"
    if not code.exists():
        return None, ""
    reason = why_not(code)
    if reason:
        return None, reason
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers()), **program.constants}
    try:
        held = [tensors[a.target].detach() for a in arguments_of(program) if a.target is not None]
        runner = _runner(code)
    except (RuntimeError, KeyError) as error:
        return None, f"it cannot be loaded: {first_line(error)}"
    return lambda *inputs: runner.run([*held, *inputs]), ""


def _runner(code: Path) -> Any:
    return torch._C._aoti.AOTIModelContainerRunnerCpu(str(code), CALLS)


def _compiled(program: ExportedProgram) -> bytes:
    """Native code of a program whose arguments are all inputs."""
    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    with tempfile.TemporaryDirectory(prefix="flm-compile-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        try:
            made = torch._inductor.aoti_compile_and_package(
                _all_inputs(program), package_path=f"{folder}/tower.pt2", inductor_configs=dict(OPTIONS)
            )
        finally:
            os.environ.pop("TORCHINDUCTOR_CACHE_DIR")
            if before is not None:
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = before
        with zipfile.ZipFile(made) as package:
            (name,) = [name for name in package.namelist() if name.endswith(".so")]
            return package.read(name)


class _Graph(nn.Module):
    """A program's graph, called with all its arguments."""

    def __init__(self, graph: nn.Module) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, *arguments: Tensor) -> Any:
        return self.graph(*arguments)


def _all_inputs(program: ExportedProgram) -> ExportedProgram:
    """The program with parameters, buffers and tables as inputs, and tables of any number of rows."""
    sizes: dict[str, tuple[Any, int]] = {}  # by name: the size, and one to trace with
    examples: list[Tensor] = []
    shapes: list[dict[int, Any]] = []
    for node, argument in zip(_placeholders(program), arguments_of(program), strict=True):
        example, free = [size or 0 for size in argument.shape], {}
        for place in (place for place, size in enumerate(argument.shape) if size is None):
            given = node.meta["val"].shape[place]
            name = str(given) if isinstance(given, torch.SymInt) else f"rows_{len(examples)}"
            if name not in sizes:
                sizes[name] = _free(program, name, given, 3 + len(sizes))
            free[place], example[place] = sizes[name]
        examples.append(torch.zeros(example, dtype=node.meta["val"].dtype))
        shapes.append(free)
    graph = _Graph(program.graph_module)
    return torch.export.export(graph, tuple(examples), dynamic_shapes=(tuple(shapes),), strict=False)


def _free(program: ExportedProgram, name: str, given: Any, example: int) -> tuple[Any, int]:
    """A size that is free within its bounds, and an example of it."""
    most = float(program.range_constraints[given.node.expr].upper) if isinstance(given, torch.SymInt) else 1e12
    if most >= 1e12:
        return Dim(name, min=1), example
    return Dim(name, min=1, max=int(most)), min(example, int(most))


def _placeholders(program: ExportedProgram) -> list[torch.fx.Node]:
    return [node for node in program.graph_module.graph.nodes if node.op == "placeholder"]


def _record(code: Path) -> Path:
    return code.with_suffix(".json")
