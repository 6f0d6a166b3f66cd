"""Checkpoint folders: complete or not there, undamaged or refused, and loading one runs no code of it.

A folder holds DCP's shards and metadata, `meta.json`, and, written last, `SHA256SUMS` of all other files, in the
format of sha256sum(1). It is written beside its place and renamed, so one without sums is no checkpoint.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import re
import secrets
from collections.abc import Callable, Iterable
from dataclasses import is_dataclass
from pathlib import Path, PurePath
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from flm_torchrec.documents import read_json
from flm_torchrec.errors import RunError
from flm_torchrec.files import new_folder, put_in_place, remove, sha256, temporary

META = "meta.json"
SUMS = "SHA256SUMS"
PART = ".sums"
OLDER = "if an older version made it, train again with this one"
"""What to do where tensors are missing, or one too many."""
MOST_METADATA = 2**20
"""Maximum bytes of .metadata, beyond as many as the shards have: it describes them in a fraction of their size."""
MOST_NESTED = 1000
"""Maximum of values inside one tuple or index of .metadata: hashing it takes time and stack for each."""
UNREADABLE = (
    pickle.UnpicklingError,
    ValueError,
    TypeError,
    AttributeError,
    KeyError,
    IndexError,
    RecursionError,
    MemoryError,
    OverflowError,
)
"""What reading a broken pickle as a description of tensors may raise."""


def write(folder: Path, tensors: dict[str, Any], meta: dict[str, Any], group: dist.ProcessGroup | None) -> None:
    """Write tensors (each rank its shards) and `meta`; collective over `group`.

    An older folder of this name stays until the new one is complete. Claim the run first: then `files.mend_inside` may
    remove what a kill leaves.

    Raises:
        RunError: it cannot be written, on every rank, with the reason of the rank that failed.
    """
    writer = _Writer(folder, meta, _drawn(group))
    try:
        dcp.save(tensors, storage_writer=writer, process_group=group)
    except (dcp.api.CheckpointException, OSError) as error:
        if writer.coordinator:  # all ranks have ended writing: they raise together
            remove(writer.fresh)
        raise RunError(f"{folder}: checkpoint not written ({_reason(error)}); what was there before is kept") from error


def read(folder: Path, tensors: dict[str, Any], group: dist.ProcessGroup | None) -> None:
    """Fill the tensors from shards that any plan and any number of ranks has written; collective over `group`.

    Raises:
        RunError: the checkpoint lacks one of them, or does not load.
    """
    try:
        dcp.load(tensors, storage_reader=_Reader(folder), planner=_Planner(), process_group=group)
    except (dcp.api.CheckpointException, OSError, EOFError, *UNREADABLE) as error:
        reason = f"the checkpoint does not fit this model ({_reason(error)})"
        raise RunError(f"{folder}: {reason}; {OLDER}") from error


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, complete, by name; needs no model and no other ranks, but memory for all of it.

    Raises:
        RunError: it does not load.
    """
    try:
        state = {}
        for name, entry in _Reader(folder).read_metadata().state_dict_metadata.items():
            if not isinstance(entry, dcp_metadata.TensorStorageMetadata):
                raise ValueError(f"{name} is no tensor")
            state[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
        dcp.load(state, storage_reader=_Reader(folder), planner=_Planner(), no_dist=True)
    except (dcp.api.CheckpointException, RuntimeError, OSError, EOFError, *UNREADABLE) as error:
        raise RunError(f"{folder}: no readable checkpoint ({_reason(error)})") from error
    return state


def stored(folder: Path) -> dict[str, torch.Size]:
    """Sizes of the tensors of a checkpoint, by name.

    Raises:
        RunError: there is none, or it is not readable.
    """
    described = read_metadata(folder).state_dict_metadata
    return {name: getattr(entry, "size", torch.Size()) for name, entry in described.items()}


def read_metadata(folder: Path) -> Metadata:
    """DCP's description of the tensors of a checkpoint.

    Raises:
        RunError: there is no checkpoint, or it is not readable.
    """
    try:
        return _Reader(folder).read_metadata()
    except (OSError, EOFError, *UNREADABLE) as error:
        raise RunError(f"{folder}: no readable checkpoint ({_reason(error)})") from error


def read_meta(folder: Path) -> dict[str, Any]:
    """`meta` of a checkpoint, without its weights.

    Raises:
        RunError: there is no complete checkpoint.
    """
    file = folder / META
    try:
        return read_json(file)
    except (OSError, ValueError) as error:
        raise RunError(f"{file}: not readable ({error}); is this a run folder whose training ended?") from error


def refuse_other_data(where: Path, made_with: str, now: str) -> None:
    """Raise RunError unless the two fingerprints of prepared data are the same."""
    if made_with != now:
        raise RunError(
            f"{where}: made with other data than data.path holds now; resume with that data, go on with the new data in"
            " another --train.run by --train.warm_start, or train anew with --train.existing replace"
        )


def damage(folder: Path, share: int = 0, shares: int = 1) -> list[str]:
    """What is wrong with the files of a checkpoint; empty if all bytes are as they were written.

    Args:
        share, shares: look only at every `shares`-th file, from number `share` on, so that ranks divide the reading.
    """
    try:
        lines = (folder / SUMS).read_bytes().decode("ascii").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        return [f"{SUMS} is not readable ({_reason(error)})"]
    matches = [re.fullmatch(r"([0-9a-f]{64})  ([\w.-]+)\n", line) for line in lines]
    # META comes last, so that sums cut short at the end of a line lack it.
    if not matches or not all(matches) or matches[-1][2] != META:  # type: ignore[index]
        return [f"{SUMS} is not as it was written"]
    there, named = {file.name for file in folder.iterdir()}, {SUMS, *(match[2] for match in matches if match)}
    if named - there or not all(map(_stray, there - named)):
        return [f"{SUMS} does not name just the files that are there"]
    wrong = []
    for match in matches[share::shares]:
        assert match is not None
        try:
            same = sha256(folder / match[2]) == match[1]
        except OSError as error:
            wrong.append(f"{match[2]} is not readable ({error.strerror})")
        else:
            wrong += [] if same else [f"{match[2]} has changed since it was written"]
    return wrong


def _stray(name: str) -> bool:
    """Whether file systems or desktops leave a file of this name in any folder (.nfs…, .DS_Store)."""
    return name.startswith(".") or name in ("Thumbs.db", "desktop.ini")


class _Writer(dcp.FileSystemWriter):
    """DCP's writer. It writes to a temporary folder, which rank 0 completes and renames when all have written."""

    def __init__(self, folder: Path, meta: dict[str, Any], token: str) -> None:
        self.final = folder
        self.token = token
        self.fresh = temporary(folder, "new", token)
        self.meta = meta
        self.coordinator = False
        super().__init__(self.fresh)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)
        self.coordinator = is_coordinator

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        if not self.coordinator:
            return plan  # they write after the coordinator has made the folder
        new_folder(self.final, self.token)
        return super().prepare_local_plan(plan)

    def storage_meta(self) -> dcp_metadata.StorageMeta:
        return dcp_metadata.StorageMeta()  # DCP would store the path of the folder, which may change

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        done = super().write_data(plan, planner)
        names = sorted({result.storage_data.relative_path for result in done.value()})
        if names:
            lines = "".join(f"{sha256(self.fresh / name)}  {name}\n" for name in names)
            (self.fresh / (names[0] + PART)).write_text(lines, encoding="ascii")
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        (self.fresh / META).write_text(json.dumps(self.meta, indent=2), encoding="utf-8")
        parts = sorted(self.fresh.glob("*" + PART))
        lines = [part.read_text(encoding="ascii") for part in parts]
        lines += [f"{sha256(self.fresh / name)}  {name}\n" for name in (".metadata", META)]
        for part in parts:
            part.unlink()
        (self.fresh / SUMS).write_text("".join(lines), encoding="ascii")
        put_in_place(self.fresh, self.final)


def _drawn(group: dist.ProcessGroup | None) -> str:
    """A token that rank 0 draws for the name of the folder that all ranks write to; collective over `group`."""
    token = [secrets.token_hex(8)]
    if group is not None and dist.get_world_size(group) > 1:
        dist.broadcast_object_list(token, src=0, group=group)
    return token[0]


class _Reader(dcp.FileSystemReader):
    """DCP's reader. Its metadata may only describe tensors in this folder."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        file = Path(self.path) / ".metadata"
        shards = sum(other.stat().st_size for other in file.parent.iterdir() if other != file)
        with file.open("rb") as stream:
            content = stream.read(shards + MOST_METADATA + 1)
        if len(content) > shards + MOST_METADATA:
            raise pickle.UnpicklingError(".metadata is larger than what it tells of")
        metadata = _Unpickler(io.BytesIO(content)).load()
        if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
            raise pickle.UnpicklingError(".metadata describes no tensors")
        for info in metadata.storage_data.values():
            if PurePath(info.relative_path).name != info.relative_path:
                raise pickle.UnpicklingError(f"'{info.relative_path}' lies outside the folder")
        if (described := sum(map(_bytes, metadata.state_dict_metadata.values()))) > shards:
            raise pickle.UnpicklingError(
                f".metadata tells of tensors of {described:,} bytes, the shards have {shards:,}"
            )
        metadata.storage_meta = dcp_metadata.StorageMeta(load_id=self.load_id)
        return metadata


def _bytes(entry: Any) -> int:
    """Bytes of a complete tensor, by its description."""
    if not isinstance(entry, dcp_metadata.TensorStorageMetadata):
        return 0
    if not isinstance(entry.size, torch.Size) or min(entry.size, default=0) < 0:
        raise pickle.UnpicklingError(".metadata tells of a tensor without a size")
    return math.prod(entry.size) * entry.properties.dtype.itemsize


class _Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        # DCP would unpickle it, which may run code. All that is not a tensor is in META.
        raise ValueError(f"{read_item.storage_index.fqn} is no tensor")


def _weighed(load: Callable[[Any], None]) -> Callable[[Any], None]:
    """An opcode that loads a tuple, and then counts the values in it."""

    def loaded(unpickler: _Unpickler) -> None:
        load(unpickler)
        made = unpickler.stack[-1]  # type: ignore[attr-defined]
        unpickler.weigh(made, made)

    return loaded


def _memory_format(kind: Any, name: str) -> Any:
    """Stands for the `getattr` by which Python 3.11.0 to 3.11.3 write a member of an enumeration."""
    if kind is not dcp_metadata._MEM_FORMAT_ENCODING or name not in kind.__members__:
        raise pickle.UnpicklingError(f".metadata asks for '{name}' of {kind!r}, which no checkpoint does")
    return kind[name]


class _Unpickler(pickle._Unpickler):  # type: ignore[name-defined]
    """Refuses whatever DCP's metadata does not need: a pickle may name any function and have it called.

    This is the unpickler written in Python, because it shows on which object a state is set. Set on a class, or on
    another object that the process shares, the state would change that object for good.
    """

    dispatch: ClassVar = dict(pickle._Unpickler.dispatch)  # type: ignore[attr-defined]

    def find_class(self, module: str, name: str) -> Any:
        """A class that DCP's metadata is made of; all others are refused."""
        if module == dcp_metadata.__name__ and name in (*dcp_metadata.__all__, "_MEM_FORMAT_ENCODING"):
            return getattr(dcp_metadata, name)
        if (module, name) == (_StorageInfo.__module__, "_StorageInfo"):
            return _StorageInfo
        if module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)):
            return getattr(torch, name)
        if (module, name) == ("torch.serialization", "_get_layout"):
            return torch.serialization._get_layout
        if (module, name) == ("builtins", "getattr"):
            return _memory_format
        raise pickle.UnpicklingError(f".metadata asks for {module}.{name}, which no checkpoint does")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.nested: dict[int, tuple[Any, int]] = {}
        """By id: a tuple or built object, kept so that no other gets its id, and the number of values in it."""

    def weigh(self, made: Any, values: Iterable[Any]) -> None:
        """Count the values in `made`; a value that occurs twice counts twice, as hashing goes through both."""
        weight = 1 + sum(self.nested.get(id(value), (None, 1))[1] for value in values)
        if weight > MOST_NESTED:
            raise pickle.UnpicklingError(f".metadata has more than {MOST_NESTED} values inside each other")
        self.nested[id(made)] = made, weight

    def load_build(self) -> None:
        """Set a state on an object, if that is a dataclass of the metadata."""
        target = self.stack[-2]  # type: ignore[attr-defined]
        if not is_dataclass(target) or isinstance(target, type):
            raise pickle.UnpicklingError(f".metadata sets a state on {target!r}, which no checkpoint does")
        state = self.stack[-1]  # type: ignore[attr-defined]
        self.weigh(target, state.values() if isinstance(state, dict) else [state])
        super().load_build()  # type: ignore[misc]

    def refuse(self) -> None:
        """Raise for an opcode that no checkpoint has."""
        raise pickle.UnpicklingError(".metadata holds bytes to be written to, which no checkpoint does")

    dispatch[pickle.BUILD[0]] = load_build  # type: ignore[assignment]
    dispatch[pickle.BYTEARRAY8[0]] = refuse  # type: ignore[assignment]  # it allocates what the file only claims
    for code in (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3):
        dispatch[code[0]] = _weighed(dispatch[code[0]])


def _reason(error: BaseException) -> str:
    """One line; of an error that DCP gathered from ranks, that of the first rank."""
    failures = getattr(error, "failures", None)
    if failures:
        rank, (first, _) = next(iter(failures.items()))
        return f"rank {rank}: {_reason(first)}"
    return " ".join(str(error).split())[:300]
