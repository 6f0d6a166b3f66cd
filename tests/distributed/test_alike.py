"""Ranks that were not given the same are refused before the first step, and an error of all ranks is told once."""

from __future__ import annotations

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from flm_torchrec.data.dataset import PreparedData
from flm_torchrec.distributed.alike import Given, differences
from flm_torchrec.distributed.comm import Comm
from flm_torchrec.errors import DataError, FlmError
from tests.conftest import ROOT

JOB = str(ROOT / "tests" / "distributed" / "alike_job.py")


def given(**values: str) -> dict[str, Given]:
    return {name: Given(value) for name, value in values.items()}


@pytest.mark.parametrize(
    ("ranks", "told"),
    [
        ([given(a="1"), given(a="1")], ""),
        ([given(a="1", b="x"), given(a="2", b="x")], "a is 2 on rank 1, 1 on rank 0"),
        ([given(a="1")] * 2 + [given(a="2")] + [given(a="1")] * 3, "a is 2 on rank 2, 1 on rank 0, 1, 3, 4 and 1 more"),
        ([given(a=str(n)) for n in range(5)], "a is 4 on rank 4, 3 on rank 3, 3 more values on others"),
        ([given(a="1"), {}], "a is not given on rank 1, 1 on rank 0"),
        ([{"data": Given("d", "x")}, {"data": Given("d", "y")}], ""),
        ([{"data": Given("d", "x")}, {"data": Given("e", "y")}], "data is e (y) on rank 1, d (x) on rank 0"),
    ],
)
def test_what_differs_is_told_with_values_and_ranks(ranks: list[dict[str, Given]], told: str) -> None:
    assert differences(ranks) == told


def test_more_than_a_line_can_hold_is_counted() -> None:
    told = differences([given(**{f"x{n}": str(rank) for n in range(9)}) for rank in (0, 1)])
    assert "x2 is" in told and "x3" not in told and told.endswith("and 6 more")


@pytest.mark.parametrize("fault", [KeyError("x"), DataError("d: gone")])
def test_no_rank_waits_for_a_rank_0_that_has_ended(fault: Exception) -> None:
    box, all_there = [None, None], threading.Barrier(2, timeout=10)

    class Linked(Comm):
        def gather(self, value):  # type: ignore[no-untyped-def, override]
            box[self.rank] = value
            all_there.wait()
            return list(box)

    def run(rank: int) -> Exception | None:
        def action() -> None:
            raise fault

        try:
            Linked(rank, 2, 2, torch.device("cpu")).on_main(action)
        except Exception as error:
            return error
        return None

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(run, range(2))
    assert first is fault and isinstance(second, FlmError)
    assert str(second) in ("rank 0 ended by KeyError ('x'); its log has more", "d: gone")


def stale(data: Path, copy: Path) -> None:
    """A copy of the same sizes in which two items have changed places."""
    shutil.copytree(data, copy)
    file = next((copy / "interactions").glob("*.parquet"))
    table = pq.read_table(file)
    items = table["item_id"].to_numpy().copy()
    items[[3, -4]] = items[[-4, 3]]
    place = table.schema.get_field_index("item_id")
    pq.write_table(table.set_column(place, table.schema.field(place), pa.array(items, table["item_id"].type)), file)


def _changed(given: list[str], other: list[str]) -> list[str]:
    """The options of rank 1: those of rank 0 and others. `--data.path` may be given once."""
    if other[:1] != ["--data.path"]:
        return [*given, *other]
    at = given.index("--data.path")
    return [*given[:at], *given[at + 2 :], *other]


def test_ranks_are_refused_or_train_as_they_were_given(ranks, small: PreparedData, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """One start of two ranks for all: what rank 1 is given otherwise, and how many lines are told."""
    stale(small.path, tmp_path / "stale")
    shutil.copytree(small.path, tmp_path / "copy")
    run = tmp_path / "run"
    short = ["--model.dim", "16", "--train.batch_size", "32", "--train.max_steps", "2", "--distributed.timeout", "60"]
    train = ["train", *short, "--data.path", str(small.path), "--train.run", str(run)]
    evaluate = ["evaluate", "--run", str(run)]
    finetune = ["finetune", "--finetune.source", str(run), "--no-control", "--train.run", str(tmp_path / "tuned")]
    calls = {
        "train.sparse_lr is 0.1 on rank 1, 0.4 on rank 0": (train, ["--train.sparse_lr", "0.1"]),
        "train.batch_size is 48 on rank 1, 32 on rank 0": (train, ["--train.batch_size", "48"]),
        "train.max_steps is 5 on rank 1": (train, ["--train.max_steps", "5"]),
        "train.seed is 7 on rank 1": (train, ["--train.seed", "7"]),
        "model.dim is 32 on rank 1": (train, ["--model.dim", "32"]),
        f"({tmp_path / 'stale'}) on rank 1": (train, ["--data.path", str(tmp_path / "stale")]),
        "trained": (train, ["--data.path", str(tmp_path / "copy"), "--distributed.threads", "2"]),
        "--split is valid on rank 1, test on rank 0": (evaluate, ["--split", "valid"]),
        "eval.ks is (3,) on rank 1": (evaluate, ["--eval.ks", "[3]"]),
        "finetune.sparse_lr is 0.5 on rank 1": (finetune, ["--finetune.sparse_lr", "0.5"]),
        "no finished run": (["evaluate", "--run", str(tmp_path / "nowhere")], []),
        "rank 1: command line: train.batch_size: must be": (
            [*train, "--distributed.timeout", "5"], ["--train.batch_size", "0"]
        ),
    }  # fmt: skip
    file = tmp_path / "calls.json"
    file.write_text(json.dumps([[given, _changed(given, other)] for given, other in calls.values()]))
    ranks(2, [JOB, str(file)])
    found = [json.loads(file.with_suffix(f".{rank}").read_text()) for rank in (0, 1)]
    for place, told in enumerate(calls):
        (code, first), (other_code, second) = found[0][place], found[1][place]
        if told == "trained":
            assert (code, other_code, first, second) == (0, 0, "", ""), (first, second)
            continue
        if told.startswith("rank 1:"):
            assert other_code == 2 and second.startswith(f"error: {told}") and second.count("\n") == 1
            continue
        assert (code, other_code) == (2, 2), (told, first, second)
        assert second == "" and first.count("\n") == 1, (told, first, second)
        expected = "no config.yaml, so no run folder" if told == "no finished run" else told
        assert first.startswith("error: ") and expected in first and "error: rank " not in first, first
    assert {p.name for p in tmp_path.iterdir()} >= {"run"} and not (tmp_path / "tuned").exists()
