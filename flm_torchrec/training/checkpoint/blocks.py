"""The blocks of a checkpoint's tensors, each read alone: what `distributed.rows` moves."""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from flm_torchrec.distributed.rows import StoredBlock, TableBlock
from flm_torchrec.errors import RunError
from flm_torchrec.training.checkpoint.storage import UNREADABLE, read_metadata


def stored_blocks(folder: Path) -> dict[str, list[StoredBlock]]:
    """The blocks of each tensor of a checkpoint, by name: one for each rank that held a part of it.

    Raises:
        RunError: there is no readable checkpoint.
    """
    metadata = read_metadata(folder)
    places = {(index.fqn, index.offset): info for index, info in metadata.storage_data.items()}
    found: dict[str, list[StoredBlock]] = {}
    for name, entry in metadata.state_dict_metadata.items():
        found[name] = []
        if not isinstance(entry, TensorStorageMetadata):
            continue
        for chunk in entry.chunks:
            info = places.get((name, chunk.offsets))
            if info is None:
                raise RunError(f"{folder}: {name} is not complete; copy the checkpoint anew, or train again")
            block = TableBlock(tuple(chunk.offsets), tuple(chunk.sizes))
            read = partial(_read, folder / info.relative_path, (info.offset, info.length), chunk.sizes)
            found[name].append(StoredBlock(block, entry.properties.dtype, read))
    return found


def _read(file: Path, place: tuple[int, int], size: torch.Size) -> torch.Tensor:
    """One block. Loading it runs no code of the file.

    Args:
        place: its first byte and its length.

    Raises:
        RunError: the file holds no such block.
    """
    try:
        with file.open("rb") as stream:
            stream.seek(place[0])
            content = io.BytesIO(stream.read(place[1]))
        found = torch.load(content, map_location="cpu", weights_only=True)
        if not isinstance(found, torch.Tensor) or found.shape != size:
            raise ValueError(f"no tensor {list(size)} at byte {place[0]}")
    except (RuntimeError, OSError, EOFError, *UNREADABLE) as error:
        reason = " ".join(str(error).split())[:300]
        raise RunError(f"{file}: no readable block of a tensor ({reason}); copy it anew, or train again") from error
    return found
