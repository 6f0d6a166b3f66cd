"""The trace of a run's steps."""

from __future__ import annotations

import json
from pathlib import Path

from flm_torchrec.cli import main
from flm_torchrec.data.dataset import PreparedData


def test_some_steps_are_traced_and_no_result_changes(small: PreparedData, tmp_path: Path) -> None:
    options = [f"--data.path={small.path}", "--model.dim=8", "--train.max_steps=9", "--train.batch_size=16"]
    losses = []
    for steps in (0, 2):
        run = tmp_path / f"run-{steps}"
        assert main(["train", *options, f"--train.run={run}", "--train.log_every=1", f"--train.profile={steps}"]) == 0
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss/sequential"] for line in lines if "loss/sequential" in line])
        assert (run / "profile-0.json").is_file() == (steps > 0)
    assert losses[0] == losses[1]
    names = [event.get("name", "") for event in json.loads((run / "profile-0.json").read_text())["traceEvents"]]
    assert {name for name in names if name.startswith("ProfilerStep")} == {"ProfilerStep#5", "ProfilerStep#6"}
    assert any(name.startswith("fbgemm::") for name in names)
    assert "aten::" in (run / "profile-0.txt").read_text()
