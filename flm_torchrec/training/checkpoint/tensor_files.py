"""A checkpoint as safetensors files: the dense part in one, the tables in others, long tables by rows.

The format holds names, sizes and numbers; reading it runs no code (https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from flm_torchrec.errors import RunError

DENSE = "dense.safetensors"
SHARD_BYTES = 2**31
"""Most bytes of tables in a file."""
Parts = list[dict[str, Any]]
"""Of a tensor, in order of rows: `file`, and `shape` [rows, …]."""


def write_tensors(folder: Path, tensors: Mapping[str, torch.Tensor], is_dense: Iterable[str]) -> dict[str, Parts]:
    """Write all tensors of a model; by name, where they are.

    Args:
        is_dense: names of the tensors that go into DENSE.
    """
    dense = set(is_dense)
    _save({name: tensors[name].contiguous() for name in sorted(dense)}, folder / DENSE)
    index = {name: [_part(DENSE, tensors[name])] for name in sorted(dense)}
    for number, shard in enumerate(_shards({n: t for n, t in sorted(tensors.items()) if n not in dense}), start=1):
        file = f"tables-{number:05d}.safetensors"
        _save(shard, folder / file)
        for name, rows in shard.items():
            index.setdefault(name, []).append(_part(file, rows))
    return index


def _save(tensors: dict[str, torch.Tensor], file: Path) -> None:
    file.touch()
    mode = file.stat().st_mode
    save_file(tensors, file)
    file.chmod(mode)  # the library lets only the owner read, and the folder is to be shared


def _part(file: str, tensor: torch.Tensor) -> dict[str, Any]:
    return {"file": file, "dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}


def _shards(tables: Mapping[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """Tables or their rows, each dict of at most SHARD_BYTES, or of one row that is larger."""
    shard: dict[str, torch.Tensor] = {}
    room = SHARD_BYTES
    for name, table in tables.items():
        rows = table if table.dim() else table[None]
        row_bytes = max(1, rows[:1].nbytes)
        start = 0
        while start < len(rows) or (not len(rows) and name not in shard):
            if shard and room < row_bytes:
                yield shard
                shard, room = {}, SHARD_BYTES
            taken = rows[start : start + max(1, room // row_bytes)] if table.dim() else table
            shard[name] = taken.clone().contiguous()
            room -= row_bytes * (len(taken) if table.dim() else 1)
            start += max(1, len(taken) if table.dim() else 1)
    if shard:
        yield shard


def read_tensors(folder: Path, index: Mapping[str, Parts]) -> dict[str, torch.Tensor]:
    """All tensors, as `index` says that they are; every file has just the tensors that it should have.

    Raises:
        RunError: a tensor is missing, has another size or type, or is one too many.
    """
    wanted: dict[str, dict[str, dict[str, Any]]] = {}
    for name, parts in index.items():
        for part in parts:
            wanted.setdefault(part["file"], {})[name] = part
    found: dict[str, list[torch.Tensor]] = {name: [] for name in index}
    for file, named in sorted(wanted.items()):
        for name, tensor in _of_file(folder / file, named):
            found[name].append(tensor)
    return {name: parts[0] if len(parts) == 1 else torch.cat(parts) for name, parts in found.items()}


def _of_file(file: Path, named: Mapping[str, dict[str, Any]]) -> list[tuple[str, torch.Tensor]]:
    try:
        with safe_open(file, framework="pt") as opened:
            found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no mapping
    except (SafetensorError, OSError) as error:
        raise RunError(f"{file}: not readable as safetensors ({error}); copy the folder anew") from error
    if odd := sorted(found.keys() ^ named.keys()):
        kind = "has no tensor" if odd[0] in named else "has a tensor that manifest.json does not name,"
        raise RunError(f"{file}: {kind} '{odd[0]}'; copy the folder anew")
    for name, part in named.items():
        there = [str(found[name].dtype).removeprefix("torch."), list(found[name].shape)]
        if there != [part["dtype"], part["shape"]]:
            said = f"{part['dtype']} {part['shape']}"
            raise RunError(f"{file}: '{name}' is {there[0]} {there[1]}, not {said} as in manifest.json; copy it anew")
    return [(name, found[name]) for name in named]
