"""Trackers of experiments that a run is shown in: TensorBoard, MLflow, Weights & Biases.

Each tracker works in a thread of its own. A server that is slow, or gone, does not hold up a step: its error is told
once, and the run goes on without the tracker.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from queue import Full, Queue
from threading import Thread
from typing import Any, Literal, Protocol

from torch.utils.tensorboard import SummaryWriter

from flm_torchrec.documents import read_json
from flm_torchrec.errors import ConfigError
from flm_torchrec.files import write_text

PROJECT = "flm_torchrec"
"""Experiment of MLflow and project of Weights & Biases where their own variables name no other."""
MOST_WAITING = 10_000
"""Calls that may wait for a tracker; a tracker that is further behind counts as failed."""
CLOSING = 30.0
"""Seconds that the end of a run waits for a tracker."""
MOST_LETTERS = 6000
"""Maximum of a parameter's value in MLflow."""
RUN_ID = "run_id"
"""File of a tracker's folder with its name for the run, so that a run that resumes goes on in the same place."""
TOLD = "told.json"
"""File of a tracker's folder with what it has been told."""
Ending = Literal["finished", "stopped", "failed"]
"""How a run ended; stopped: on request, it can resume."""


@dataclass(frozen=True)
class About:
    """What a tracker is told of a run when it starts."""

    folder: Path
    """The run folder, absolute."""
    settings: Mapping[str, Any]
    """The config, by `section.field`."""
    resumed: bool = False


class Tracker(Protocol):
    """One tracker. A method may raise anything: it ends the tracker, not the run."""

    def start(self, about: About) -> None:
        """Begin, or go on where the same run was left."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Values of a step, by name such as `valid/fused/ndcg@10`."""

    def rewind(self, step: int) -> None:
        """What was told after a step will be told again: the run resumes from there."""

    def finish(self, ending: Ending, summary: Mapping[str, float]) -> None:
        """End, with the values that the run is to be known by."""


class TensorBoard:
    """Curves in RUN/tensorboard."""

    def start(self, about: About) -> None:
        """As of `Tracker`."""
        self.folder = str(about.folder / "tensorboard")
        self.writer = SummaryWriter(self.folder)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """As of `Tracker`."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def rewind(self, step: int) -> None:
        """As of `Tracker`: TensorBoard leaves out what was after the step."""
        self.writer.close()
        self.writer = SummaryWriter(self.folder, purge_step=step + 1)

    def finish(self, ending: Ending, summary: Mapping[str, float]) -> None:
        """As of `Tracker`; the summary is among the curves."""
        self.writer.close()


class Told:
    """What a tracker has been told that takes nothing back: by the name of a value, its last step.

    It is kept in the run folder. A run that resumes from a checkpoint does steps again, and tells none of them twice.
    """

    def __init__(self, file: Path, resumed: bool) -> None:
        self.file = file
        self.last: dict[str, int] = read_json(file) if resumed and file.is_file() else {}

    def untold(self, step: int, values: Mapping[str, float]) -> dict[str, float]:
        """The values that the tracker has not been told of this step or of a later one."""
        return {name: value for name, value in values.items() if self.last.get(name, -1) < step}

    def note(self, step: int, values: Mapping[str, float]) -> None:
        """The tracker has been told these."""
        self.last.update(dict.fromkeys(values, step))

    def save(self) -> None:
        """All that was noted has reached the tracker."""
        write_text(self.file, json.dumps(self.last))


class MLflow:
    """A run of MLflow, at the server of MLFLOW_TRACKING_URI, in the experiment of MLFLOW_EXPERIMENT_NAME."""

    def start(self, about: About) -> None:
        """As of `Tracker`. Parameters are written once: MLflow does not let them change."""
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self.client = MlflowClient()
        file = about.folder / "mlflow" / RUN_ID
        self.told = Told(file.with_name(TOLD), about.resumed)
        if about.resumed and file.is_file():
            self.run = file.read_text(encoding="ascii")
            self.client.update_run(self.run, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self.client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self.client.create_experiment(name)
        tags = {"run_folder": str(about.folder)}
        self.run = self.client.create_run(number, run_name=about.folder.name, tags=tags).info.run_id
        file.parent.mkdir(exist_ok=True)
        write_text(file, self.run)
        settings = [Param(name, str(value)[:MOST_LETTERS]) for name, value in about.settings.items()]
        self.client.log_batch(self.run, params=settings)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """As of `Tracker`."""
        untold = self.told.untold(step, values)
        if untold:
            self._log(step, untold)
            self.told.note(step, untold)
            self.told.save()

    def _log(self, step: int, values: Mapping[str, float]) -> None:
        """MLflow allows no `@` in a name."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        points = [Metric(name.replace("@", "_at_"), value, now, step) for name, value in values.items()]
        self.client.log_batch(self.run, metrics=points)

    def rewind(self, step: int) -> None:
        """As of `Tracker`. MLflow takes no point back; `metrics` leaves out what it has."""

    def finish(self, ending: Ending, summary: Mapping[str, float]) -> None:
        """As of `Tracker`."""
        if summary:
            self._log(int(summary["best/step"]), summary)
        states = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
        self.client.set_terminated(self.run, states[ending])


class WeightsAndBiases:
    """A run of Weights & Biases, in the project of WANDB_PROJECT. WANDB_MODE=offline: files in RUN/wandb alone."""

    def start(self, about: About) -> None:
        """As of `Tracker`.

        Raises:
            ConfigError: it would have to ask for a key, which a job cannot answer.
        """
        import wandb

        file = about.folder / "wandb" / RUN_ID
        known = about.resumed and file.is_file()
        self.told = Told(file.with_name(TOLD), about.resumed)
        name = file.read_text(encoding="ascii") if known else uuid.uuid4().hex[:16]
        if wandb.setup().settings.mode in (None, "online", "shared") and not wandb.login(prompt=False):
            raise ConfigError("not logged in; run 'wandb login', or set WANDB_MODE=offline")
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=about.folder.name,
            dir=about.folder,
            id=name,
            resume="allow" if known else None,
            config={"run_folder": str(about.folder), **about.settings},
            settings=wandb.Settings(console="off", silent=True, save_code=False, disable_git=True),
        )
        self.run.define_metric("*", step_metric="step")
        write_text(file, name)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """As of `Tracker`. `step` is a value beside the others: a validation may be told after a later step."""
        untold = self.told.untold(step, values)
        if untold:
            self.run.log({"step": step, **untold})
            self.told.note(step, untold)

    def rewind(self, step: int) -> None:
        """As of `Tracker`. Weights & Biases takes no point back; `metrics` leaves out what it has."""

    def finish(self, ending: Ending, summary: Mapping[str, float]) -> None:
        """As of `Tracker`."""
        self.run.summary.update(dict(summary))
        self.run.finish(exit_code=int(ending == "failed"))
        self.told.save()  # not before: a process that is killed loses what Weights & Biases holds in memory


TRACKERS: dict[str, tuple[str, Callable[[], Tracker]]] = {
    "tensorboard": ("tensorboard", TensorBoard),
    "mlflow": ("mlflow", MLflow),
    "wandb": ("wandb", WeightsAndBiases),
}
"""By name in `train.trackers`: the module that must be installed, and the tracker."""


def check_trackers(names: Iterable[str]) -> None:
    """Raise ConfigError where a tracker's package is not installed."""
    for name in names:
        if find_spec(TRACKERS[name][0]) is None:
            package = {"mlflow": "mlflow-skinny"}.get(name, name)
            raise ConfigError(
                f"train.trackers: {name} is not installed; run: pip install {package}, or leave {name} out"
            )


class Trackers:
    """The trackers of a run, each in a thread of its own."""

    def __init__(self, names: Sequence[str], about: About) -> None:
        self.lanes = {name: _Lane(TRACKERS[name][1](), about) for name in names}

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Values of a step; does not wait."""
        told = dict(values)
        for lane in self.lanes.values():
            lane.put(lambda tracker: tracker.metrics(step, told))

    def rewind(self, step: int) -> None:
        """See `Tracker.rewind`; does not wait."""
        for lane in self.lanes.values():
            lane.put(lambda tracker: tracker.rewind(step))

    def problems(self) -> list[str]:
        """A line for each tracker that has failed since the last call."""
        found = []
        for name, lane in self.lanes.items():
            if lane.error and not lane.told:
                lane.told = True
                found.append(f"{name}: {lane.error}; the run goes on without it")
        return found

    def finish(self, ending: Ending, summary: Mapping[str, float]) -> None:
        """End all; waits for each, but together no longer than `CLOSING` seconds."""
        until = time.monotonic() + CLOSING
        for lane in self.lanes.values():
            lane.put(lambda tracker: tracker.finish(ending, summary))
            lane.put(None)
        for lane in self.lanes.values():
            lane.thread.join(max(0.0, until - time.monotonic()))
            if lane.thread.is_alive() and not lane.error:
                lane.error = f"has not answered for {CLOSING:.0f} s, so that its last values may be missing"


class _Lane:
    """A thread that calls one tracker, until it fails."""

    def __init__(self, tracker: Tracker, about: About) -> None:
        self.error = ""
        self.told = False
        self.waiting: Queue[Callable[[Tracker], None] | None] = Queue(MOST_WAITING)
        self.thread = Thread(target=self._work, args=(tracker,), daemon=True)
        self.put(lambda tracker: tracker.start(about))
        self.thread.start()

    def put(self, call: Callable[[Tracker], None] | None) -> None:
        """Let the thread make a call, unless the tracker has failed; None ends the thread."""
        if self.error:
            return
        try:
            self.waiting.put_nowait(call)
        except Full:
            self.error = f"is {MOST_WAITING:,} calls behind"

    def _work(self, tracker: Tracker) -> None:
        while not self.error and (call := self.waiting.get()) is not None:
            try:
                call(tracker)
            except Exception as error:  # whatever a client raises, a run does not end for it
                self.error = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
