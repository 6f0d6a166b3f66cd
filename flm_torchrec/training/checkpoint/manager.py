"""The checkpoints of a run: the best model, and the newest whole states to resume from."""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.optim.keyed import CombinedOptimizer

from flm_torchrec.distributed.comm import Comm
from flm_torchrec.distributed.shard import prepare_state, set_step
from flm_torchrec.errors import RunError
from flm_torchrec.files import discard, mend_inside
from flm_torchrec.training.checkpoint import storage
from flm_torchrec.training.checkpoint.state import copies, leaves, names, own_bytes

CHECKPOINTS = "checkpoints"
BEST = f"{CHECKPOINTS}/best"
STATE = re.compile(r"step-(\d{9,})")
"""Name of a state to resume from, by its step."""
ASIDE = re.compile(rf"damaged-{STATE.pattern}(-\d+)?")
"""Name of a state that was found damaged."""
DENSE = "dense."
RNG = "rng."
LEAVE = 10.0
"""Seconds that an error waits for a save under way."""
KEPT = 2
"""Newest states that are kept: should one turn out damaged, there is the one before."""


@dataclass
class Progress:
    """Where training stands: with the tensors of a state, all that going on needs. The loader follows from `step`."""

    step: int = 0
    seconds: float = 0.0
    """Spent in steps and their checkpoints."""
    best: float | None = None
    best_step: int = 0
    stale: int = 0
    """Validations since the best."""
    due: bool = False
    """Stopped within the validation after this step, which then comes first."""
    following: dict[str, Any] = field(default_factory=dict)
    """Of `flm follow`: where it stands in its source, and what it has counted."""

    def worn_out(self, patience: int) -> bool:
        """Whether so many validations have brought no gain; never for 0."""
        return 0 < patience <= self.stale


class Checkpoints:
    """Writes and finds the checkpoints of one run; every method is collective.

    Args:
        run: run folder, which all ranks see.
        data: fingerprint of the prepared data.
    """

    def __init__(self, run: Path, model: nn.Module, optimizer: CombinedOptimizer, comm: Comm, data: str) -> None:
        self.best = run / BEST
        self.folder = run / CHECKPOINTS
        self.model = model
        self.optimizer = optimizer
        self.comm = comm
        self.data = data
        self.pending: tuple[Future[None], threading.Thread] | None = None
        self.failed = ""
        """Why the last save is not on disk; empty if it is, or may yet be."""
        self.untold: list[str] = []

    def check_space(self) -> None:
        """Raise RunError, on every rank, where the disk has no room for the checkpoints that a run keeps."""
        tensors = leaves(self._state())
        own = sum(own_bytes(tensor) for tensor in tensors if isinstance(tensor, ShardedTensor))
        # AdamW will hold two more of each dense tensor.
        dense = 3 * sum(t.numel() * t.element_size() for t in tensors if not isinstance(t, ShardedTensor))
        # The kept states and the one being written; the best model twice while it is replaced.
        need = (KEPT + 3) * (sum(self.comm.gather(own)) + dense)

        def check() -> None:
            nonlocal need
            held = [file for folder in (self.best, *self._states()) for file in folder.glob("*")]
            need -= sum(file.stat().st_size for file in held)
            free = shutil.disk_usage(self.best.parents[1]).free
            if free < need:
                raise RunError(
                    f"{self.folder}: checkpoints need up to {need / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free;"
                    " make room, or give another --train.run"
                )

        self.comm.on_main(check)

    def save(self, progress: Progress, folder: Path | None = None) -> str:
        """Copy the state now, write it while training goes on; waits for the one before.

        A save that fails leaves the older checkpoints; `finish` raises if it was the last. So does one of weights that
        are no numbers, unless it has a folder of its own: it would take the place of one that is of use.

        Args:
            folder: where to, if it is no state to resume from.

        Returns what went wrong with the save before, or with this one; empty if nothing did.
        """
        self.wait()
        tensors = copies({**self._state(), f"{RNG}{self.comm.rank}": torch.get_rng_state()})
        if self.comm.device.type == "cuda":
            tensors[f"{RNG}cuda.{self.comm.rank}"] = torch.cuda.get_rng_state()
        broken = any(not bool(t.isfinite().all()) for t in leaves(tensors) if not isinstance(t, ShardedTensor))
        if self.comm.any(broken)[0] and folder is None:
            self._fail(f"{self.folder}: the weights after step {progress.step} are not all numbers, so not saved")
            return self._tell()
        self.failed = ""
        meta = {**asdict(progress), "data": self.data, "ranks": self.comm.world_size}
        target = (folder or self.folder) / f"step-{progress.step:09d}"
        future: Future[None] = Future()

        def run() -> None:
            try:
                storage.write(target, tensors, meta, self.comm.saving)
                if self.comm.main:
                    self._retire()
                future.set_result(None)
            except BaseException as error:
                future.set_exception(error)

        thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        thread.start()
        self.pending = future, thread
        return self._tell()

    def _fail(self, reason: str) -> None:
        self.failed = reason
        self.untold.append(reason)

    def _tell(self) -> str:
        told, self.untold = "; ".join(self.untold), []
        return told

    def wait(self) -> None:
        """Wait for the save under way, if any."""
        if self.pending is None:
            return
        (future, thread), self.pending = self.pending, None
        thread.join()
        try:
            future.result()
        except RunError as error:
            self._fail(str(error))

    def close(self) -> None:
        """Leave no thread behind that writes, where training ends by an error; it has ended or soon will."""
        if self.pending is not None:
            self.pending[1].join(LEAVE)

    def finish(self) -> None:
        """Wait for the last save.

        Raises:
            RunError: it failed.
        """
        self.wait()
        if self.failed:
            raise RunError(self.failed)

    def save_best(self, meta: dict[str, Any]) -> None:
        """Write the model as the best one, before training goes on.

        Raises:
            RunError: it cannot be written.
        """
        self.wait()
        storage.write(self.best, {"model": self.model.state_dict()}, {**meta, "data": self.data}, self.comm.saving)

    def restore(self) -> tuple[Progress, list[Path], list[str]] | None:
        """Load the newest state that is whole and undamaged; None where there is none.

        Returns also the states found damaged, and what is wrong with them and with the best model.

        Raises:
            RunError: the state is of other data, or does not fit the model.
        """
        damaged: list[Path] = []
        told: list[str] = []
        for folder in self.comm.gather(self._states())[0]:
            wrong = find_damage(folder, self.comm)
            if wrong:
                damaged.append(folder)
                told.append(f"{folder}: {'; '.join(wrong)}")
                continue
            progress = self.load(folder)
            if progress.best is not None and (wrong := find_damage(self.best, self.comm)):
                progress.best = None  # the next validation makes a new one
                told.append(f"{self.best}: {'; '.join(wrong)}")
            return progress, damaged, told
        if damaged:
            raise RunError(
                f"{told[0]}; and no older one is whole, so there is nothing to go on from; train anew with"
                " --train.existing replace"
            )
        return None

    def tidy(self) -> None:
        """Mend and clear away what an interruption left half done."""
        self.comm.on_main(lambda: mend_inside(self.folder))

    def put_aside(self, damaged: Iterable[Path]) -> None:
        """Rename damaged states, so that retention does not count them."""

        def rename() -> None:
            for folder in damaged:
                names = (f"damaged-{folder.name}{again}" for again in ("", *(f"-{n}" for n in count(2))))
                folder.rename(next(path for name in names if not (path := folder.with_name(name)).exists()))

        self.comm.on_main(rename)

    def _states(self) -> list[Path]:
        found = [(STATE.fullmatch(folder.name), folder) for folder in self.folder.glob("step-*")]
        return [folder for _, folder in sorted(((int(m[1]), f) for m, f in found if m), reverse=True)]

    def _retire(self) -> None:
        for folder in self._states()[KEPT:]:
            discard(folder)

    def _state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()["state"]}

    def load(self, folder: Path) -> Progress:
        """Set model, optimizer and random numbers to a state, whose files are not checked.

        Raises:
            RunError: it is of other data, or does not fit the model.
        """
        meta = storage.read_meta(folder)
        try:
            data, ranks = meta.pop("data"), meta.pop("ranks")
            progress = Progress(**meta)
        except (KeyError, TypeError) as error:
            raise RunError(f"{folder}/{storage.META}: not that of a state to resume from ({error})") from error
        storage.refuse_other_data(folder, data, self.data)
        there = storage.stored(folder)
        prepare_state(self.optimizer, [n.removeprefix("optimizer.") for n in there if n.startswith("optimizer.")])
        state = self._state()
        # Each rank draws its own dropout: with other ranks, or on another device, there is nothing to go on from.
        drawn = [name for name in _rng_names(self.comm) if name in there and ranks == self.comm.world_size]
        state |= {name: torch.empty(there[name], dtype=torch.uint8) for name in drawn}
        # A rank's optimizer knows the tables that it holds rows of.
        known = set().union(*self.comm.gather(names(state)))
        extra = {name for name in there if not name.startswith(RNG)} - known
        if extra:
            raise RunError(f"{folder}: holds {min(extra)}, which this model lacks; resume with the settings of the run")
        storage.read(folder, state, self.comm.saving)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict({"state": state["optimizer"]})
        set_step(self.model, progress.step)
        for name in drawn:
            (torch.cuda.set_rng_state if name.startswith(f"{RNG}cuda.") else torch.set_rng_state)(state[name])
        return progress


def load_checkpoint(folder: Path, model: nn.Module, comm: Comm) -> dict[str, Any]:
    """Fill the model from a checkpoint and return its `meta`; collective.

    Raises:
        RunError: there is none, it is damaged, or does not fit the model.
    """
    meta = storage.read_meta(folder)
    _refuse_damage(folder, comm)
    state = {"model": model.state_dict()}
    storage.read(folder, state, comm.saving)
    model.load_state_dict(state["model"])
    return meta


def load_matching(folder: Path, model: nn.Module, tables: bool, comm: Comm) -> str:
    """Fill what the model shares with a checkpoint, by name and shape, and say what that was; collective.

    Args:
        tables: also the embedding tables; False where ids mean something else.

    Raises:
        RunError: the checkpoint does not load, or shares nothing.
    """
    _refuse_damage(folder, comm)
    there = storage.stored(folder)
    state = model.state_dict()
    shared = {
        name: tensor
        for name, tensor in state.items()
        if there.get(f"model.{name}") == tensor.size() and (tables or name.startswith(DENSE))
    }
    if not shared:
        raise RunError(f"{folder}: nothing in it fits this model; fine-tune with the model settings of the source")
    storage.read(folder, {"model": shared}, comm.saving)
    model.load_state_dict({**state, **shared})
    fresh = sorted(state.keys() - shared.keys())
    return f"{len(shared)} of {len(state)} tensors from {folder}; new: {', '.join(fresh) or 'none'}"


def find_damage(folder: Path, comm: Comm) -> list[str]:
    """What is wrong with a checkpoint's files, the same on every rank; the ranks share the reading."""
    found = comm.gather(storage.damage(folder, comm.rank, comm.world_size))
    return sorted({problem for problems in found for problem in problems})


def _refuse_damage(folder: Path, comm: Comm) -> None:
    if wrong := find_damage(folder, comm):
        raise RunError(f"{folder}: {'; '.join(wrong)}; copy it anew, or train again")


def _rng_names(comm: Comm) -> list[str]:
    cuda = [f"{RNG}cuda.{comm.rank}"] if comm.device.type == "cuda" else []
    return [f"{RNG}{comm.rank}", *cuda]
