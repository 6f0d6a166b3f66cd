"""C++ files of this package as native code.

Each is compiled at its first use, by the C++ compiler of this machine for its processor, and kept in the user's cache.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flm_torchrec.files import replacing_file
from flm_torchrec.machine_code import code_folder, open_to_others, processor_instructions
from flm_torchrec.safe_text import first_line

OPTIONS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC", "-w")
INCLUDED = Path(__file__).parent
"""The folder with what the C++ files include."""
MOST_SECONDS = 60
"""Of the compiler."""


class Unavailable(Exception):
    """The native code cannot be used; the message says why."""


def why_none(load: Callable[[], ctypes.CDLL]) -> ctypes.CDLL | str:
    """What `load` gives; or why it gives nothing, in a few words."""
    try:
        return load()
    except Unavailable as error:
        return str(error)
    except (OSError, subprocess.SubprocessError) as error:
        return f"it cannot be built: {first_line(error)}"


def built(source: Path, options: tuple[str, ...] = OPTIONS) -> ctypes.CDLL:
    """The library of a C++ file, compiled unless it is there.

    Raises:
        Unavailable, OSError, subprocess.SubprocessError: it cannot be; see `why_none`.
    """
    texts = [path.read_text(encoding="utf-8") for path in (source, *sorted(INCLUDED.rglob("*.h")))]
    content = [*texts, *options, *sorted(processor_instructions())]
    name = hashlib.sha256("\n".join(content).encode()).hexdigest()[:32]
    folder = code_folder("kernels")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    code = folder / f"{name}.so"
    with _one_at_a_time(folder):
        if not code.exists():
            _compile(source, code, options)
        for path in (folder, code):
            if open_to_others(path):
                raise Unavailable(f"{path} may be written by others")
        return ctypes.CDLL(str(code))


def why_not_native(load: Callable[[], ctypes.CDLL | str], device: torch.device) -> str:
    """Why PyTorch takes the place of native code on a CPU, in a few words; empty where it does not, and elsewhere."""
    found = load() if device.type == "cpu" else ""
    return found if isinstance(found, str) else ""


def argument(kind: type[ctypes.Structure], tensors: Mapping[str, Tensor | None], **numbers: float) -> Any:
    """A structure by reference: where tensors are in memory, null for None, and numbers. Its user keeps the tensors."""
    places = {name: value.data_ptr() for name, value in tensors.items() if value is not None}
    return ctypes.byref(kind(**places, **numbers))


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Wait until no other process is here; ranks of a host build once."""
    with (folder / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _compile(source: Path, code: Path, options: tuple[str, ...]) -> None:
    compiler = os.environ.get("CXX") or "c++"
    with replacing_file(code) as fresh:
        command = [*compiler.split(), *options, f"-I{INCLUDED}", str(source), "-o", str(fresh)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=MOST_SECONDS, check=False)
        except FileNotFoundError as error:
            raise Unavailable(f"there is no C++ compiler {compiler!r}; install g++, or set CXX") from error
        if done.returncode:
            raise Unavailable(f"{compiler}: {first_line(done.stderr or str(done.returncode))}")
        fresh.chmod(0o700)
