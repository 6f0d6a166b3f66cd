"""`flm tune`: spaces that are refused, searches that find, end early, are killed and go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from math import log10
from pathlib import Path

import pytest

from flm_torchrec.cli import main
from flm_torchrec.config import load_config
from flm_torchrec.data.dataset import PreparedData
from flm_torchrec.errors import ConfigError, Interrupted, RunError
from flm_torchrec.tuning import trial
from flm_torchrec.tuning.space import Choices, Range, read_space
from flm_torchrec.tuning.study import TuneOptions, table, tune
from tests.conftest import ROOT
from tests.tuning.fake_training import SPACE, VALIDATIONS, FakeTraining

optuna = pytest.importorskip("optuna")


@pytest.fixture
def space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a space; trainings are looked at without a pause."""
    monkeypatch.setattr(trial, "POLL", 0.0)
    file = tmp_path / "space.yaml"
    file.write_text(SPACE)
    return file


def quiet(_: str) -> None:
    """Say nothing."""


def options(output: Path, trials: int, **given: object) -> TuneOptions:
    """Options of a search whose trainings take no time."""
    return replace(TuneOptions(output, trials, launch=FakeTraining, pruner="none"), **given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("space: {train.sparse_rate: [1, 2]}", "unknown key 'train.sparse_rate'; did you mean 'sparse_lr'?"),
        ("space: {trian.sparse_lr: [1, 2]}", "unknown section 'trian'; did you mean 'train'?"),
        ("space: {sparse_lr: [1, 2]}", "'sparse_lr' is no setting; write it as section.field"),
        ("space: {model.dropout: [0.1, 1.5]}", "model.dropout: must be a number from 0 below 1"),
        ("space: {model.dropout: {low: 0, high: 2}}", "model.dropout: must be a number from 0 below 1"),
        ("space: {model.dim: {low: 8.5, high: 16}}", "model.dim: must be a multiple of 4"),
        ("space: {model.dim: {low: 8, high: 64}}", "model.dim: must be a multiple of 4 from 4 to 65,536, not 9"),
        ("space: {model.dim: {low: 8, high: 4096}}", "model.dim: must be a multiple of 4 from 4 to 65,536, not 9"),
        ("space: {model.block: [hstu, gru]}", "model.block: must be one of transformer, hstu"),
        ("space: {model.block: {low: hstu, high: transformer}}", "model.block: has no range"),
        ("space: {model.relative_bias: {low: false, high: true}}", "model.relative_bias: has no range"),
        ("space: {train.sparse_lr: {low: 1, high: 0.1}}", "low 1.0 is above high 0.1"),
        ("space: {train.sparse_lr: {low: 0, high: 0.1, log: true}}", "log needs a low end above 0"),
        ("space: {train.sparse_lr: {low: 0, high: 1, setp: 0.1}}", "unknown key 'setp'; did you mean 'step'?"),
        ("space: {model.layers: {low: 1, high: 3, step: 0.5}}", "step must be a number above 0"),
        ("space: {model.layers: {low: 1, high: 10, step: 4}}", "miss high 10, so it would never be tried; give high 9"),
        ("space: {model.dropout: {low: 0.1, high: 0.5, step: 0.3}}", "give high 0.4"),
        ("space: {train.sparse_lr: 0.1}", "give a list of choices, or {low"),
        ("space: {train.sparse_lr: []}", "give a list of single values"),
        ("space: {model.dim: [16, 16]}", "a choice is there twice"),
        ("space: {model.dim: [28, 32], model.attention_heads: [2, 8]}", "not a multiple of model.attention_heads 8"),
        ("space: {train.run: [a, b]}", "train.run is not to be chosen: each trial has its own"),
        ("settings: {train.existing: replace}\nspace: {model.dim: [16]}", "train.existing is not to be chosen"),
        ("space: {eval.ks: [5, 10]}", "eval.ks is not to be chosen: all trials share it"),
        ("space: {train.seed: [0, 1]}", "train.seed is not to be chosen"),
        ("settings: {model.dmi: 8}\nspace: {model.dim: [16]}", "unknown key 'model.dmi'; did you mean 'dim'?"),
        ("variants: {}\nspace: {model.dim: [16]}", "unknown key 'variants'"),
        ("config: gone.yaml\nspace: {model.dim: [16]}", "gone.yaml: No such file"),
        ("settings: {train.select: fused/ndgc@10}\nspace: {model.dim: [16]}", "did you mean 'fused/ndcg@10'?"),
        ("{}", "has no 'space'"),
    ],
)
def test_a_wrong_space_is_one_line_before_any_work(
    text: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "space.yaml"
    file.write_text(text)
    assert main(["tune", str(file), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and told in error, error
    assert not (tmp_path / "out").exists()


def test_values_are_held_as_the_config_holds_them(tmp_path: Path) -> None:
    file = tmp_path / "space.yaml"
    ranges = "train.clip: {low: 1, high: 2}, model.dropout: {low: 0, high: 0.3, step: 0.1}"
    file.write_text(f"space: {{train.dense_lr: [1e-3, 2e-3], {ranges}, data.features: [all, 'a,b']}}")
    assert read_space(file).parts == {
        "train.dense_lr": Choices((0.001, 0.002)),
        "train.clip": Range(1.0, 2.0),
        "model.dropout": Range(0.0, 0.3, 0.1),
        "data.features": Choices(("all", "a,b")),
    }


def test_a_search_writes_the_table_and_a_config_for_train(space: Path, tmp_path: Path) -> None:
    found = tune(read_space(space), options(tmp_path / "out", 6, jobs=2), quiet)
    assert found.best is not None and [t.state.name for t in found.trials] == ["COMPLETE"] * 6
    best = load_config(tmp_path / "out" / "best.yaml")
    assert (best.train.sparse_lr, best.model.dim) == tuple(found.best.params.values())
    assert (best.train.run, best.train.existing, best.model.layers) == (str(tmp_path / "out" / "best"), "refuse", 1)
    lines = (tmp_path / "out" / "trials.md").read_text().splitlines()
    assert lines[0] == "| trial | fused/ndcg@10 | validations | train.sparse_lr | model.dim | |" and len(lines) == 8
    values = [float(line.split("|")[2]) for line in lines[2:]]
    assert values == sorted(values, reverse=True) and "**best**" in lines[2]
    assert values[0] == round(0.5 - 0.1 * abs(log10(best.train.sparse_lr) + 1) + 0.03, 4)
    more = tune(read_space(space), options(tmp_path / "out", 8), quiet)
    assert len(more.trials) == 8 and more.trials[:6] == found.trials
    assert len({t.params["train.sparse_lr"] for t in more.trials}) == 8


def test_trials_share_the_cores_unless_they_are_given_threads(space: Path, tmp_path: Path) -> None:
    space.write_text("settings: {data.path: none, distributed.threads: 0}\nspace: {model.dim: [16]}")
    given: list[str] = []

    def launch(command: list[str], log: Path) -> FakeTraining:
        given.append(command[command.index("--distributed.threads") + 1])
        return FakeTraining(command, log)

    tune(read_space(space), options(tmp_path / "shared", 1, jobs=1, launch=launch), quiet)
    space.write_text(space.read_text().replace("threads: 0", "threads: 7"))
    tune(read_space(space), options(tmp_path / "own", 1, jobs=1, launch=launch), quiet)
    assert given == [str(len(os.sched_getaffinity(0))), "7"]


def test_a_search_that_is_killed_loses_no_trial(space: Path, tmp_path: Path) -> None:
    """At its sixth validation, with two trials under way."""
    output = tmp_path / "out"
    command = [sys.executable, str(ROOT / "tests" / "tuning" / "fake_training.py"), str(space), str(output), "6"]
    killed = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=200, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = {file.parent.name: file.read_text() for file in output.glob("*/metrics.jsonl")}
    assert sum(text.count("\n") for text in left.values()) == 6

    found = tune(read_space(space), options(output, 5, jobs=2), quiet)
    assert [(t.number, t.state.name) for t in found.trials] == [(n, "COMPLETE") for n in range(5)]
    for trial_ in found.trials:
        text = (output / f"trial-{trial_.number:04d}" / "metrics.jsonl").read_text()
        assert text.startswith(left.get(f"trial-{trial_.number:04d}", "")) and text.count("\n") == VALIDATIONS
        assert len(trial_.intermediate_values) == VALIDATIONS
        config = load_config(output / f"trial-{trial_.number:04d}.yaml")
        assert config.train.sparse_lr == trial_.params["train.sparse_lr"]


def test_a_search_that_is_asked_to_stop_goes_on_later(space: Path, tmp_path: Path) -> None:
    def seen(training: FakeTraining) -> None:
        if len(training.file.read_text().splitlines()) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    stopping = options(tmp_path / "out", 3, launch=lambda command, log: FakeTraining(command, log, seen))
    with pytest.raises(Interrupted, match="goes on with what is in"):
        tune(read_space(space), stopping, quiet)
    assert signal.getsignal(signal.SIGTERM) is before
    said: list[str] = []
    found = tune(read_space(space), options(tmp_path / "out", 3), said.append)
    assert said[0] == "1 unfinished trials go on" and [t.state.name for t in found.trials] == ["COMPLETE"] * 3


@pytest.mark.parametrize("pruner", ["median", "asha"])
def test_trials_without_prospect_end_early(pruner: str, space: Path, tmp_path: Path) -> None:
    found = tune(read_space(space), options(tmp_path / "out", 14, pruner=pruner), quiet)
    early = [t for t in found.trials if t.state.name == "PRUNED"]
    assert early and all(len(t.intermediate_values) < VALIDATIONS for t in early)
    assert found.best is not None and found.best.state.name == "COMPLETE"
    best = found.best.value or 0.0
    assert all(t.value is None or t.value <= best for t in found.trials)
    assert "ended early" in table(found)


def test_a_training_that_fails_is_told_and_the_others_go_on(space: Path, tmp_path: Path) -> None:
    def seen(training: FakeTraining) -> None:
        if "trial-0001" in str(training.file):
            training.log.write_text("error: data/none: is | gone\n")
            training.code = 2

    failing = options(tmp_path / "out", 3, launch=lambda command, log: FakeTraining(command, log, seen))
    found = tune(read_space(space), failing, quiet)
    assert [t.state.name for t in found.trials] == ["COMPLETE", "FAIL", "COMPLETE"]
    assert "failed: data/none: is \\| gone" in (tmp_path / "out" / "trials.md").read_text()


def test_a_folder_of_something_else_is_refused(space: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="holds no search"):
        tune(read_space(space), options(tmp_path / "out", 1), quiet)
    tune(read_space(space), options(tmp_path / "other", 1), quiet)
    space.write_text(SPACE.replace("[16, 32]", "[16, 64]"))
    with pytest.raises(RunError, match="another space or config"):
        tune(read_space(space), options(tmp_path / "other", 2), quiet)
    with pytest.raises(ConfigError, match="--jobs 0"):
        tune(read_space(space), options(tmp_path / "other", 2, jobs=0), quiet)


def test_trials_are_runs_of_train(small: PreparedData, tmp_path: Path) -> None:
    """Two at once, and the best config trains."""
    from tests.processes import forked

    file = tmp_path / "space.yaml"
    settings = "model.dim: 8, train.batch_size: 64, data.max_history: 5, train.max_steps: 4, train.eval_every: 2"
    file.write_text(f"settings: {{data.path: {small.path}, {settings}}}\nspace: {{train.sparse_lr: [0.01, 0.5]}}\n")
    real = options(tmp_path / "out", 2, jobs=2, launch=lambda command, log: forked(command))
    found = tune(read_space(file), real, quiet)
    assert [(t.state.name, len(t.intermediate_values)) for t in found.trials] == [("COMPLETE", 2)] * 2
    assert found.best is not None and found.best.value == max(found.best.intermediate_values.values()) > 0
    assert (tmp_path / "out" / "trial-0000" / "checkpoints" / "best").is_dir()
    best = ["train", "--config", str(tmp_path / "out" / "best.yaml"), "--train.max_steps", "1"]
    assert main(best) == 0 and (tmp_path / "out" / "best" / "metrics.jsonl").is_file()
