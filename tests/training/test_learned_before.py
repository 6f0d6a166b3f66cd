"""A fine-tuning and a warm start predict nothing that their source has learned from."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from flm_torchrec.cli import main
from flm_torchrec.prepare.options import PrepareOptions
from flm_torchrec.prepare.prepare import prepare
from flm_torchrec.prepare.sources import synthetic
from tests.conftest import rows_of
from tests.training.test_warm_start import SMALL, part_of

BY_TIME = ["--data.split", "time", "--data.holdout", "0.2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run by leave-one-out, its data, and these without some users, so that all numbers differ."""
    folder = tmp_path_factory.mktemp("learned")
    raw = synthetic.read(synthetic.Recipe(users=60, items=100, events=10, seed=2))
    prepare(raw, folder / "data", PrepareOptions())
    prepare(part_of(raw, lambda key: key.startswith("u") and key.endswith("1")), folder / "anew", PrepareOptions())
    assert main(["train", "--data.path", str(folder / "data"), "--train.run", str(folder / "run"), *SMALL]) == 0
    return folder


@pytest.mark.parametrize("data", ["data", "anew"])
@pytest.mark.parametrize("command", [["finetune", "--finetune.source"], ["train", "--train.warm_start"]])
def test_events_that_the_source_learned_from_are_not_predicted(
    command: list[str], data: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    given = [*command, str(folder / "run"), "--data.path", str(folder / data), "--train.run", str(out)]
    assert main([*given, *BY_TIME]) == 2
    told = capsys.readouterr().err
    assert "has learned from" in told and "take its split, --data.split leave-one-out" in told
    assert told.count("\n") == 1 and not list(out.glob("**/config.yaml"))
    assert main(given) == 0


def test_another_split_is_refused_where_nobody_can_tell(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "run", tmp_path / "run")
    (tmp_path / "run/config.yaml").write_text(
        (folder / "run/config.yaml").read_text().replace(str(folder / "data"), str(tmp_path / "gone"))
    )
    given = ["--train.warm_start", str(tmp_path / "run"), "--data.path", str(folder / "anew")]
    assert main(["train", *given, "--train.run", str(tmp_path / "out"), *BY_TIME]) == 2
    assert "whose data are gone" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_newer_events_may_have_another_split(folder: Path, tmp_path: Path) -> None:
    raw = synthetic.read(synthetic.Recipe(users=60, items=100, events=10, seed=2))
    events = rows_of(raw)
    events = events.with_columns(timestamp=events["timestamp"] + 10**8)
    prepare(replace(raw, interactions=events, oracle=None), tmp_path / "later", PrepareOptions())
    given = ["--train.warm_start", str(folder / "run"), "--data.path", str(tmp_path / "later"), *BY_TIME]
    assert main(["train", *given, "--train.run", str(tmp_path / "out")]) == 0
