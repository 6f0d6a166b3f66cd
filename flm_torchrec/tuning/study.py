"""The search: trials side by side by Optuna, kept in a file, so that a search that ends early goes on where it was."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from flm_torchrec.claim import claim
from flm_torchrec.config import Config, to_yaml
from flm_torchrec.documents import read_yaml
from flm_torchrec.errors import ConfigError, Interrupted, RunError
from flm_torchrec.files import write_text
from flm_torchrec.tuning.process import launch, threads_of
from flm_torchrec.tuning.space import Choices, Space
from flm_torchrec.tuning.trial import Launch, TrialRun

if TYPE_CHECKING:
    import optuna

Pruner = Literal["median", "asha", "none"]
STORAGE, SPACE, TABLE, BEST = "trials.db", "space.yaml", "trials.md", "best.yaml"
"""Files of the output folder: Optuna's storage, what was searched, the table of trials, the best config."""
STARTUP = 4
"""Trials that the median needs before it ends one."""


@dataclass(frozen=True)
class TuneOptions:
    """How to search."""

    output: Path
    """Folder of the search and of its runs."""
    trials: int = 20
    """Of the whole search, those of earlier calls included."""
    jobs: int = 1
    """Trials at once; they share the cores."""
    pruner: Pruner = "median"
    """Which trials end early."""
    seed: int = 0
    """Of the values that are tried."""
    launch: Launch = launch
    """Starts a training."""


@dataclass(frozen=True)
class Tuned:
    """What a search has found up to now."""

    metric: str
    trials: list[optuna.trial.FrozenTrial]
    best: optuna.trial.FrozenTrial | None
    output: Path


def tune(space: Space, options: TuneOptions, say: Callable[[str], None]) -> Tuned:
    """Search a space for the config with the highest `train.select` on validation.

    Trials that an earlier call has left unfinished go on from their checkpoints before new ones begin.

    Raises:
        ConfigError: Optuna is not installed, or an option is out of its range.
        RunError: the folder is in use, or holds something else than a search of this space.
        Interrupted: asked to stop; all trials have saved their state.
    """
    optuna = _optuna()
    for name in ("trials", "jobs"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name} {getattr(options, name)}: must be at least 1")
    with claim(options.output):
        _open(space, options.output)
        storage = optuna.storages.RDBStorage(f"sqlite:///{options.output.resolve() / STORAGE}")
        search = _Search(optuna, storage, space, options, say)
        search.all()
        return search.found()


def _optuna() -> Any:
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise ConfigError("flm tune: needs optuna; run: pip install optuna") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def _open(space: Space, output: Path) -> None:
    """Make the folder of a search, or check that the one there is of the same space."""
    wanted = yaml.safe_load(yaml.safe_dump(_record(space)))
    file = output / SPACE
    if file.is_file():
        if read_yaml(file) != wanted:
            raise RunError(f"{output}: holds a search of another space or config; give another --output")
        return
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RunError(f"{output}: exists and holds no search of 'flm tune'; give another --output")
    output.mkdir(parents=True, exist_ok=True)
    write_text(file, yaml.safe_dump(wanted, sort_keys=False))


def _record(space: Space) -> dict[str, Any]:
    parts = {
        name: list(part.values)
        if isinstance(part, Choices)
        else {"low": part.low, "high": part.high, "step": part.step, "log": part.log}
        for name, part in space.parts.items()
    }
    return {"settings": yaml.safe_load(to_yaml(space.base)), "space": parts}


class _Search:
    """The trials of a search. Threads share Optuna's study one at a time."""

    def __init__(self, optuna: Any, storage: Any, space: Space, options: TuneOptions, say: Callable[[str], None]):
        self.optuna, self.space, self.options, self.say = optuna, space, options, say
        pruners = {
            "median": lambda: optuna.pruners.MedianPruner(n_startup_trials=STARTUP, n_warmup_steps=1),
            "asha": lambda: optuna.pruners.SuccessiveHalvingPruner(),
            "none": lambda: optuna.pruners.NopPruner(),
        }
        self.study = optuna.create_study(
            storage=storage,
            study_name="flm",
            load_if_exists=True,
            direction="maximize",
            pruner=pruners[options.pruner](),
        )
        before = self.study.get_trials(deepcopy=False)
        # With the same seed a search that goes on would draw the values of its first trials again.
        self.study.sampler = optuna.samplers.TPESampler(seed=options.seed + len(before))
        running = optuna.trial.TrialState.RUNNING
        self.unfinished = [trial._trial_id for trial in before if trial.state == running]
        self.fresh = max(0, options.trials - len(before))
        self.lock = threading.RLock()
        self.stop = threading.Event()

    def all(self) -> None:
        """Run what is unfinished, then new trials, `jobs` at once."""
        if self.unfinished:
            self.say(f"{len(self.unfinished)} unfinished trials go on")
        with _asked(self.stop), ThreadPoolExecutor(self.options.jobs) as pool:
            working = [pool.submit(self._work) for _ in range(self.options.jobs)]
            for one in working:
                one.result()
        if self.stop.is_set():
            raise Interrupted(f"stopped as asked; the same command goes on with what is in {self.options.output}")

    def _work(self) -> None:
        try:
            while not self.stop.is_set() and (trial := self._next()) is not None:
                self._run(trial)
        except Interrupted:
            return
        except BaseException:
            self.stop.set()  # the other trials save their state
            raise

    def _next(self) -> optuna.trial.Trial | None:
        with self.lock:
            if self.unfinished:
                return self.optuna.trial.Trial(self.study, self.unfinished.pop(0))
            if not self.fresh:
                return None
            self.fresh -= 1
            return self.study.ask()

    def _run(self, trial: optuna.trial.Trial) -> None:
        with self.lock:
            values = self._values(trial)
        name = f"trial {trial.number}"
        run = self.options.output / f"trial-{trial.number:04d}"
        try:
            config = self.space.config(values, name)
        except ConfigError as error:
            return self._tell(trial, None, str(error))
        own = replace(config.train, run=str(run), existing="resume")
        threads = config.distributed.threads or threads_of(self.options.jobs)
        training = TrialRun(replace(config, train=own), threads, self.options.launch)
        pruned = threading.Event()

        def watch(values: list[float]) -> bool:
            with self.lock:
                if self._is_pruned(trial, values):
                    pruned.set()
            return not pruned.is_set()

        code = training.run(watch, self.stop)
        found = training.validations()
        if code and not pruned.is_set():
            return self._tell(trial, None, training.problem())
        with self.lock:
            self._is_pruned(trial, found)  # those since the last look are kept too
        self._tell(trial, None if pruned.is_set() and code else max(found), "")

    def _values(self, trial: optuna.trial.Trial) -> dict[str, Any]:
        """The values of a trial, drawn; those that were drawn before stay."""
        values: dict[str, Any] = {}
        for name, part in self.space.parts.items():
            if isinstance(part, Choices):
                values[name] = trial.suggest_categorical(name, part.values)
            elif part.whole:
                step = int(part.step or 1)
                values[name] = trial.suggest_int(name, int(part.low), int(part.high), step=step, log=part.log)
            else:
                values[name] = trial.suggest_float(name, part.low, part.high, step=part.step, log=part.log)
        return values

    def _is_pruned(self, trial: optuna.trial.Trial, values: list[float]) -> bool:
        """Tell Optuna the validations that it does not know, by their number; whether it would end the trial."""
        known = self.study.get_trials(deepcopy=False)[trial.number].intermediate_values
        for number, value in enumerate(values, start=1):
            if number not in known:
                trial.report(value, number)
        return trial.should_prune()

    def _tell(self, trial: optuna.trial.Trial, value: float | None, problem: str) -> None:
        """End a trial: with a value, as failed with a problem, or as pruned without either."""
        states = self.optuna.trial.TrialState
        with self.lock:
            if problem:
                trial.set_user_attr("problem", problem)
                self.study.tell(trial, state=states.FAIL)
            elif value is None:
                self.study.tell(trial, state=states.PRUNED)
            else:
                self.study.tell(trial, value)
            result = problem or ("ended early" if value is None else f"{value:.4f}")
            self.say(f"trial {trial.number}: {result}")
            self._write()

    def found(self) -> Tuned:
        """What is known up to now."""
        complete = (self.optuna.trial.TrialState.COMPLETE,)
        with self.lock:
            best = self.study.best_trial if self.study.get_trials(deepcopy=False, states=complete) else None
            return Tuned(self.space.base.train.select, self.study.get_trials(), best, self.options.output)

    def _write(self) -> None:
        """The table, and the best config, as of now."""
        found = self.found()
        write_text(self.options.output / TABLE, table(found))
        if found.best is not None:
            write_text(self.options.output / BEST, to_yaml(self._best(found.best)))

    def _best(self, trial: optuna.trial.FrozenTrial) -> Config:
        """The config of the best trial, with a run folder of its own."""
        config = self.space.config(trial.params, f"trial {trial.number}")
        return replace(config, train=replace(config.train, run=str(self.options.output / "best"), existing="refuse"))


def table(found: Tuned) -> str:
    """All trials as Markdown, the best first, those without a value last."""
    names = list(dict.fromkeys(name for trial in found.trials for name in trial.params))
    lines = [
        f"| trial | {found.metric} | validations | {' | '.join(names)} | |",
        f"|---:|---:|---:|{'---|' * len(names)}---|",
    ]
    complete = {trial.number for trial in found.trials if trial.state.name == "COMPLETE"}
    order = sorted(found.trials, key=lambda t: (t.number not in complete, -(t.value or 0.0), t.number))
    for trial in order:
        values = [_cell(trial.params.get(name)) for name in names]
        note = {"COMPLETE": "", "PRUNED": "ended early", "RUNNING": "unfinished"}.get(trial.state.name, "failed")
        if "problem" in trial.user_attrs:
            note = f"failed: {trial.user_attrs['problem']}".replace("|", "\\|")
        best = "**best**" if found.best is not None and trial.number == found.best.number else note
        shown = "" if trial.value is None else f"{trial.value:.4f}"
        cells = [str(trial.number), shown, str(len(trial.intermediate_values)), *values, best]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@contextmanager
def _asked(stop: threading.Event) -> Iterator[None]:
    """Set the event at SIGTERM and Ctrl-C. Only the main thread can ask for signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
