"""Trackers: what MLflow and Weights & Biases are told of a run, and runs whose tracker fails."""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest

from flm_torchrec.cli import main
from flm_torchrec.data.dataset import PreparedData
from flm_torchrec.errors import Interrupted
from flm_torchrec.training import trackers
from flm_torchrec.training.logger import RunLogger
from flm_torchrec.training.trackers import About, Ending, Trackers

TINY = ["--model.dim", "8", "--train.batch_size", "64", "--data.max_history", "5", "--train.max_steps", "2"]


@pytest.fixture
def mlflow_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where MLflow keeps its runs: a folder."""
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/mlruns")
    return f"file:{tmp_path}/mlruns"


class Fake:
    """A tracker that notes what it is told, and fails or hangs at a step."""

    def __init__(self, fails_at: int | None = None, hangs_at: int | None = None) -> None:
        self.fails_at, self.hangs_at = fails_at, hangs_at
        self.told: list[object] = []
        self.free = threading.Event()

    def start(self, about: About) -> None:
        self.told.append(about)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        if step == self.hangs_at:
            self.free.wait(60)
        if step == self.fails_at:
            raise ConnectionError("the server\nis gone")
        self.told.append((step, values))

    def rewind(self, step: int) -> None:
        self.told.append(step)

    def finish(self, ending: Ending, summary: Mapping[str, float]) -> None:
        self.told.append((ending, summary))


def logger_with(folder: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> RunLogger:
    """The logger of a run of 10 steps with one tracker."""
    monkeypatch.setitem(trackers.TRACKERS, "mlflow", ("flm_torchrec", lambda: fake))
    return RunLogger(folder, 10, trackers=Trackers(["mlflow"], About(folder, {"model.dim": 8})))


def test_mlflow_and_wandb_are_told_of_a_run(
    small: PreparedData, tmp_path: Path, mlflow_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "shop")
    where = ["--data.path", str(small.path), "--train.run", str(tmp_path / "r"), "--train.log_every", "1"]
    assert main(["train", *where, *TINY, "--train.trackers", "mlflow,wandb"]) == 0
    assert "goes on without" not in (tmp_path / "r" / "train.log").read_text()
    assert not (tmp_path / "r" / "tensorboard").exists()

    from mlflow import MlflowClient

    client = MlflowClient(mlflow_folder)
    experiment = client.get_experiment_by_name("shop")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == (tmp_path / "r" / "mlflow" / "run_id").read_text()
    assert (run.info.status, run.data.params["model.dim"]) == ("FINISHED", "8")
    assert run.data.tags["run_folder"] == str(tmp_path / "r")
    steps = client.get_metric_history(run.info.run_id, "loss/sequential")
    assert [point.step for point in steps] == [1, 2] and steps[0].value > 0
    metrics = run.data.metrics
    assert metrics["best/fused/ndcg_at_10"] == metrics["valid/fused/ndcg_at_10"]
    assert sum(metrics[f"best/fusion/{head}"] for head in ("content", "collaborative", "sequential")) > 0

    (file,) = (tmp_path / "r" / "wandb").glob("offline-run-*/run-*.wandb")
    content = file.read_bytes()
    for name in (b"loss/sequential", b"valid/fused/ndcg@10", b"best/fused/ndcg@10", b"model.dim", b"run_folder"):
        assert name in content, name


def test_a_run_that_resumes_goes_on_in_the_same_run_of_mlflow_and_tells_no_step_twice(
    tmp_path: Path, mlflow_folder: str
) -> None:
    first = Trackers(["mlflow"], About(tmp_path, {"model.dim": 8}))
    for step in (4, 5):
        first.metrics(step, {"loss": 10.0 - step})
    first.metrics(5, {"valid/hr@5": 0.5})
    first.finish("stopped", {})
    again = Trackers(["mlflow"], About(tmp_path, {"model.dim": 8}, resumed=True))
    again.rewind(3)
    for step in (4, 5, 6):
        again.metrics(step, {"loss": 10.0 - step})
    again.metrics(5, {"valid/hr@5": 0.5, "valid/mrr": 0.25})
    again.finish("finished", {"best/step": 5, "best/fused/hr@5": 0.25})
    assert first.problems() + again.problems() == []

    from mlflow import MlflowClient

    client, name = MlflowClient(mlflow_folder), (tmp_path / "mlflow" / "run_id").read_text()
    run = client.get_run(name)
    assert (run.info.status, run.data.metrics) == (
        "FINISHED",
        {"loss": 4.0, "valid/hr_at_5": 0.5, "valid/mrr": 0.25, "best/step": 5, "best/fused/hr_at_5": 0.25},
    )
    history = [(point.step, point.value) for point in client.get_metric_history(name, "loss")]
    assert history == [(4, 6.0), (5, 5.0), (6, 4.0)]
    assert [point.step for point in client.get_metric_history(name, "valid/hr_at_5")] == [5]


@pytest.mark.parametrize(("stopped", "told_again"), [(True, [6, 7]), (False, [5, 6, 7])])
def test_wandb_is_told_again_only_what_a_kill_may_have_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: bool, told_again: list[int]
) -> None:
    """A stub stands for wandb: it keeps what is told in memory until the end, as wandb does."""
    runs: list[SimpleNamespace] = []

    def init(**given: object) -> SimpleNamespace:
        told: list[dict[str, float]] = []
        nothing = SimpleNamespace(log=told.append, told=told, given=given, define_metric=lambda *_, **__: None)
        nothing.summary, nothing.finish = {}, lambda exit_code: None
        runs.append(nothing)
        return nothing

    settings = SimpleNamespace(mode="offline")
    stub = SimpleNamespace(init=init, setup=lambda: SimpleNamespace(settings=settings), Settings=dict)
    monkeypatch.setitem(sys.modules, "wandb", stub)
    (tmp_path / "wandb").mkdir()
    first = Trackers(["wandb"], About(tmp_path, {}))
    for step in (5, 6):
        first.metrics(step, {"loss": 1.0})
    first.finish("stopped", {})
    if not stopped:
        (tmp_path / "wandb" / "told.json").write_text('{"loss": 4}')  # of an end before: a kill writes nothing
    again = Trackers(["wandb"], About(tmp_path, {}, resumed=True))
    again.rewind(4)
    for step in (5, 6, 7):
        again.metrics(step, {"loss": 1.0, "valid/mrr": 0.5} if step == 6 else {"loss": 1.0})
    again.finish("finished", {"best/step": 6})
    assert first.problems() + again.problems() == []
    assert runs[0].given["id"] == runs[1].given["id"] and runs[1].given["resume"] == "allow"
    assert [values["step"] for values in runs[1].told] == told_again
    expected = {"step": 6, "valid/mrr": 0.5} if stopped else {"step": 6, "loss": 1.0, "valid/mrr": 0.5}
    assert expected in runs[1].told and runs[1].summary == {"best/step": 6}


def test_a_server_that_is_not_there_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    lost = Trackers(["mlflow"], About(tmp_path, {}))
    for step in range(3):
        lost.metrics(step, {"loss": 1.0})
    lost.finish("finished", {})
    (line,) = lost.problems()
    assert line.startswith("mlflow: ") and "127.0.0.1" in line and "\n" not in line
    assert line.endswith("the run goes on without it") and lost.problems() == []


def test_a_tracker_that_fails_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(fails_at=2)
    with logger_with(tmp_path, fake, monkeypatch) as logger:
        for step in (1, 2, 3, 4):
            logger.scalars(step, {"loss": 1.0})
        logger.best(4, {"fused/ndcg@10": 0.5})
    log = (tmp_path / "train.log").read_text()
    assert log.count("mlflow: ConnectionError: the server is gone; the run goes on without it") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4
    assert fake.told[1:] == [(1, {"loss": 1.0})]


def test_a_tracker_that_hangs_holds_up_no_step_and_the_end_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "CLOSING", 0.01)
    monkeypatch.setattr(trackers, "MOST_WAITING", 3)
    fake = Fake(hangs_at=1)
    with logger_with(tmp_path, fake, monkeypatch) as logger:
        for step in range(1, 20):
            logger.scalars(step, {"loss": 1.0})
    fake.free.set()
    assert (tmp_path / "train.log").read_text().count("mlflow: is 3 calls behind; the run goes on without it") == 1
    fake = Fake(hangs_at=1)
    with logger_with(tmp_path, fake, monkeypatch) as logger:
        logger.scalars(1, {"loss": 1.0})
    fake.free.set()
    assert (tmp_path / "train.log").read_text().count("has not answered") == 1


def test_how_a_run_ended_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for error, ending in ((None, "finished"), (Interrupted("stop"), "stopped"), (ValueError("broken"), "failed")):
        fake = Fake()
        try:
            with logger_with(tmp_path, fake, monkeypatch):
                if error is not None:
                    raise error
        except (Interrupted, ValueError):
            pass
        assert fake.told[-1] == (ending, {})


@pytest.mark.parametrize(("name", "package"), [("mlflow", "mlflow-skinny"), ("wandb", "wandb")])
def test_a_tracker_that_is_not_installed_is_one_line(
    name: str, package: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda module: None if module == name else object())
    given = ["train", "--data.path", str(tmp_path / "none"), "--train.run", str(tmp_path / "r")]
    assert main([*given, "--train.trackers", f"tensorboard,{name}"]) == 2
    error = capsys.readouterr().err
    assert error == (
        f"error: train.trackers: {name} is not installed; run: pip install {package}, or leave {name} out\n"
    )
    assert not (tmp_path / "r").exists()


def test_an_unknown_tracker_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--train.run", str(tmp_path / "r"), "--train.trackers", "tensorboard,mlfow"]) == 2
    error = capsys.readouterr().err
    assert "train.trackers" in error and "mlfow" in error and "tensorboard, mlflow, wandb" in error
