"""The checkpoints of a run: the best model, and the newest complete states to resume from."""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.optim.keyed import CombinedOptimizer

from flm_torchrec.data.schema import Schema
from flm_torchrec.data.vocabulary import RowMatch
from flm_torchrec.distributed.comm import Comm
from flm_torchrec.distributed.shard import prepare_state, set_step
from flm_torchrec.errors import RunError
from flm_torchrec.files import discard, mend_inside
from flm_torchrec.model.pretrain import user_weights
from flm_torchrec.training.checkpoint import storage
from flm_torchrec.training.checkpoint.by_key import MODEL, OPTIMIZER, TABLES, fill_by_key, zero_unlearned
from flm_torchrec.training.checkpoint.state import copies, is_finite, leaves, names, own_bytes

CHECKPOINTS = "checkpoints"
BEST = f"{CHECKPOINTS}/best"
STATE = re.compile(r"step-(\d{9,})")
"""Name of a state to resume from, by its step."""
ASIDE = re.compile(rf"damaged-{STATE.pattern}(-\d+)?")
"""Name of a state that was found damaged."""
RNG = "rng."
BESIDE = "beside."
"""Beginning of the names of what a job keeps beside model and optimizer."""
LEAVE = 10.0
"""Seconds that a training which ends by an error waits for a save under way."""
KEPT = 2
"""Number of newest states that are kept: if one turns out damaged, there is the one before."""


@dataclass
class Progress:
    """Where training stands: together with the tensors, all that resuming needs. The loader follows from `step`."""

    step: int = 0
    seconds: float = 0.0
    """Time spent in steps and their checkpoints."""
    best: float | None = None
    best_step: int = 0
    stale: int = 0
    """Validations since the best."""
    due: bool = False
    """The validation after this step was stopped, so a resumed run begins with it."""
    steps_before: int = 0
    """Steps of the runs that this one was started from: Adam of the tables counts them too."""
    following: dict[str, Any] = field(default_factory=dict)
    """What `flm follow` adds: its position in the source, and its counts."""

    def worn_out(self, patience: int) -> bool:
        """Whether `patience` validations have brought no gain; never for 0."""
        return 0 < patience <= self.stale


class Checkpoints:
    """Writes and finds the checkpoints of one run; every method is collective.

    Args:
        run: run folder, which all ranks see.
        data: fingerprint of the prepared data.
    """

    def __init__(self, run: Path, model: nn.Module, optimizer: CombinedOptimizer, comm: Comm, data: str) -> None:
        self.run = run
        self.best = run / BEST
        self.folder = run / CHECKPOINTS
        self.model = model
        self.optimizer = optimizer
        self.comm = comm
        self.data = data
        self.beside: dict[str, torch.Tensor] = {}
        """By name, tensors that belong to the state, the same on all ranks; `load` fills those that the state has."""
        self.fit: Callable[[Progress], None] = lambda progress: None
        """Called before a state is loaded: gives `model` and `optimizer` the sizes that the state has."""
        self.pending: tuple[Future[None], threading.Thread] | None = None
        self.failed = ""
        """Why the last save is not on disk; empty if it is there, or is still being written."""
        self.unreported: list[str] = []

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
            present = [file for folder in (self.best, *states_of(self.run)) for file in folder.glob("*")]
            need -= sum(file.stat().st_size for file in present)
            free = shutil.disk_usage(self.best.parents[1]).free
            if free < need:
                raise RunError(
                    f"{self.folder}: checkpoints need up to {need / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free;"
                    " make room, or give another --train.run"
                )

        self.comm.on_main(check)

    def save(self, progress: Progress, folder: Path | None = None) -> str:
        """Copy the state now, and write it while training goes on; waits for the save before.

        A save that fails leaves the older checkpoints, and `finish` raises if it was the last. Weights that are not
        numbers are not saved either, since they would replace a state that is of use, unless `folder` is given.

        Args:
            folder: where to write a state that no run resumes from.

        Returns what went wrong with the save before, or with this one; empty if nothing did.
        """
        self.wait()
        beside = {f"{BESIDE}{name}": tensor for name, tensor in self.beside.items()}
        tensors = copies({**self._state(), **beside, f"{RNG}{self.comm.rank}": torch.get_rng_state()})
        if self.comm.device.type == "cuda":
            tensors[f"{RNG}cuda.{self.comm.rank}"] = torch.cuda.get_rng_state()
        broken = not all(is_finite(tensor) for tensor in leaves(tensors))
        if self.comm.any(broken)[0] and folder is None:
            self._fail(f"{self.folder}: the weights after step {progress.step} are not all numbers, so not saved")
            return self._report()
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
        return self._report()

    def _fail(self, reason: str) -> None:
        self.failed = reason
        self.unreported.append(reason)

    def _report(self) -> str:
        reasons, self.unreported = "; ".join(self.unreported), []
        return reasons

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
        """Wait up to LEAVE seconds for the thread that writes, where training ends by an error."""
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
        """Load the newest state that is complete and undamaged; None where there is none.

        Returns its progress, the damaged states, and what is wrong with those and with the best model.

        Raises:
            RunError: the state is of other data, or does not fit the model.
        """
        damaged: list[Path] = []
        reasons: list[str] = []
        for folder in self.comm.gather(states_of(self.run))[0]:
            wrong = find_damage(folder, self.comm)
            if wrong:
                damaged.append(folder)
                reasons.append(f"{folder}: {'; '.join(wrong)}")
                continue
            progress = self.load(folder)
            if progress.best is not None and (wrong := find_damage(self.best, self.comm)):
                progress.best = None  # the next validation makes a new one
                reasons.append(f"{self.best}: {'; '.join(wrong)}")
            return progress, damaged, reasons
        if damaged:
            raise RunError(
                f"{reasons[0]}; and no older one is whole, so there is nothing to go on from; train anew with"
                " --train.existing replace"
            )
        return None

    def tidy(self) -> None:
        """Mend or remove what an interruption left half done."""
        self.comm.on_main(lambda: mend_inside(self.folder))

    def put_aside(self, damaged: Iterable[Path]) -> None:
        """Rename damaged states, so that they do not count as kept states."""

        def rename() -> None:
            for folder in damaged:
                names = (f"damaged-{folder.name}{again}" for again in chain([""], (f"-{n}" for n in count(2))))
                folder.rename(next(path for name in names if not (path := folder.with_name(name)).exists()))

        self.comm.on_main(rename)

    def _retire(self) -> None:
        for folder in states_of(self.run)[KEPT:]:
            discard(folder)

    def _state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()["state"]}

    def load(self, folder: Path) -> Progress:
        """Set model, optimizer and random numbers to a state; its files are not checked for damage.

        Raises:
            RunError: the state is of other data, or does not fit the model.
        """
        progress, data, ranks = _read_progress(folder)
        storage.refuse_other_data(folder, data, self.data)
        self.fit(progress)
        stored = storage.stored(folder)
        beside = {f"{BESIDE}{n}": tensor for n, tensor in self.beside.items() if f"{BESIDE}{n}" in stored}
        # Each rank draws its own dropout: other ranks, or another device, cannot continue those draws.
        there = stored if ranks == self.comm.world_size else {}
        drawn = {n: torch.empty(there[n], dtype=torch.uint8) for n in _rng_names(self.comm) if n in there}
        self._fill(folder, {**drawn, **beside}, {})
        set_step(self.model, progress.steps_before + progress.step)
        for name, state in drawn.items():
            (torch.cuda.set_rng_state if name.startswith(f"{RNG}cuda.") else torch.set_rng_state)(state)
        return progress

    def load_by_key(
        self, folder: Path, matches: Mapping[str, RowMatch], spared: Mapping[str, np.ndarray] | None = None
    ) -> int:
        """Set model and optimizer to a state of other data; its files are not checked for damage.

        Args:
            matches: by name of a table's weight, where its rows come from.
            spared: tables in which rows that never learned become zero; see `zero_unlearned`.

        Returns the number of steps that the optimizer has taken.

        Raises:
            RunError: the state does not fit the model.
        """
        progress, _, _ = _read_progress(folder)
        self._fill(folder, {}, matches)
        zero_unlearned(self._state(), spared or {})
        steps = progress.steps_before + progress.step
        set_step(self.model, steps)
        return steps

    def _fill(self, folder: Path, more: dict[str, torch.Tensor], matches: Mapping[str, RowMatch]) -> None:
        """Fill model, optimizer and the tensors `more`, such as states of random numbers, from a state."""
        there = storage.stored(folder)
        prepare_state(self.optimizer, [n.removeprefix(OPTIMIZER) for n in there if n.startswith(OPTIMIZER)])
        state = {**self._state(), **more}
        # A rank's optimizer has only the tables of which the rank holds rows.
        wanted = set().union(*self.comm.gather(names(state)))
        extra = {name for name in there if not name.startswith((RNG, BESIDE))} - wanted
        if extra:
            raise RunError(
                f"{folder}: holds {min(extra)}, which this model lacks; resume with the settings of the run;"
                f" {storage.OLDER}"
            )
        fill_by_key(folder, state, matches, self.comm)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict({"state": state["optimizer"]})


def load_checkpoint(folder: Path, model: nn.Module, comm: Comm) -> dict[str, Any]:
    """Fill the model from a checkpoint and return its `meta`; collective.

    Raises:
        RunError: there is none, it is damaged, or does not fit the model.
    """
    meta = storage.read_meta(folder)
    refuse_damage(folder, comm)
    state = {"model": model.state_dict()}
    storage.read(folder, state, comm.saving)
    model.load_state_dict(state["model"])
    return meta


def user_tensors(schema: Schema, stored: Iterable[str]) -> dict[str, tuple[str, list[str]]]:
    """Which tensors of a checkpoint hold rows of users, and of values that users and their events have.

    Args:
        stored: names of the checkpoint's tensors.

    Returns by table of `user_weights` the name of its weight, and the names of its optimizer state.
    """
    stored = list(stored)
    return {
        table: (f"{MODEL}{weight}", [name for name in stored if name.startswith(f"{TABLES}{weight}.")])
        for table, weight in user_weights(schema).items()
    }


def find_damage(folder: Path, comm: Comm) -> list[str]:
    """What is wrong with a checkpoint's files, the same on every rank; the ranks share the reading."""
    of_ranks = comm.gather(storage.damage(folder, comm.rank, comm.world_size))
    return sorted({problem for problems in of_ranks for problem in problems})


def refuse_damage(folder: Path, comm: Comm) -> None:
    """Raise RunError, on every rank, where the files of a checkpoint have changed; collective."""
    if wrong := find_damage(folder, comm):
        raise RunError(f"{folder}: {'; '.join(wrong)}; copy it anew, or train again")


def states_of(run: Path) -> list[Path]:
    """The states of a run to go on from, the newest first."""
    matches = [(STATE.fullmatch(folder.name), folder) for folder in (run / CHECKPOINTS).glob("step-*")]
    return [folder for _, folder in sorted(((int(m[1]), f) for m, f in matches if m), reverse=True)]


def _read_progress(folder: Path) -> tuple[Progress, str, int]:
    """Progress of a state, fingerprint of its data, and number of the ranks that wrote it."""
    meta = storage.read_meta(folder)
    try:
        data, ranks = meta.pop("data"), meta.pop("ranks")
        return Progress(**meta), data, ranks
    except (KeyError, TypeError) as error:
        raise RunError(f"{folder}/{storage.META}: not that of a state to resume from ({error})") from error


def _rng_names(comm: Comm) -> list[str]:
    cuda = [f"{RNG}cuda.{comm.rank}"] if comm.device.type == "cuda" else []
    return [f"{RNG}{comm.rank}", *cuda]
