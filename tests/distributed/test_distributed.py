"""Real processes over gloo: the same numbers at any number of ranks and under any sharding."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from flm_torchrec.data.dataset import PreparedData
from tests.distributed import steps_job

JOB = str(Path(steps_job.__file__))
SMALL = ["model.dim=16", "train.batch_size=31", "data.max_history=6", "train.sparse_lr=0.1"]


def steps(ranks, data: PreparedData, output: Path, count: int, *overrides: str) -> dict:  # type: ignore[no-untyped-def]
    ranks(count, [JOB, str(data.path), str(output), *SMALL, *overrides])
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def one(small: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """Losses and ranks of a single process without a launcher, by `loss.negatives`."""
    found = {}
    for negatives in ("16", "all"):
        output = tmp_path_factory.mktemp("one") / "one.json"
        steps_job.main(str(small.path), str(output), [*SMALL, f"loss.negatives={negatives}"])
        found[negatives] = json.loads(output.read_text())
    return found


@pytest.mark.parametrize(
    ("count", "sharding", "negatives"),
    [
        (2, "auto", "16"),
        (2, "table_wise", "all"),
        (2, "row_wise", "16"),
        (2, "column_wise", "16"),
        (4, "row_wise", "all"),
    ],
)
def test_losses_and_ranks_do_not_depend_on_ranks_or_sharding(  # type: ignore[no-untyped-def]
    ranks, small: PreparedData, tmp_path: Path, one: dict[str, dict], count: int, sharding: str, negatives: str
) -> None:
    overrides = (f"distributed.sharding={sharding}", f"loss.negatives={negatives}")
    many = steps(ranks, small, tmp_path / "many.json", count, *overrides)
    if sharding != "auto":
        assert many["sharding"] == [sharding]
    losses, alone = np.array(many["losses"]), np.array(one[negatives]["losses"])
    # The fusion learns a few held-out events a step: too few for its loss to fall surely in 20 steps.
    assert losses.shape == (20, 6) and losses[0, :3].sum() > losses[-1, :3].sum()
    np.testing.assert_allclose(losses, alone, rtol=1e-4)
    # Sizes and ids of all tables; vectors and gradients of four modules; the number of bags where ranks sum vectors; of
    # the losses three; the dense gradients. The guard has one more.
    collectives = 2 + 8 + (sharding == "row_wise") + 3 + 1
    if sharding != "auto":  # which may give one module tables of two types: vectors and gradients of each
        assert sum(many["collectives"].values()) == collectives
    assert 0 < sum(many["collectives"].values()) + 1 < 20
    # The weights differ in their last bits after 20 steps, so a near tie may fall the other way.
    assert np.mean(np.array(many["ranks"]) == np.array(one[negatives]["ranks"])) > 0.95


def test_a_rank_may_have_nothing_to_learn(ranks, small: PreparedData, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """The last batch of an epoch has one sequence, and no negatives are drawn.

    A loss among one item is 0 but for rounding.
    """
    given = ("train.batch_size=32", "loss.negatives=0")
    steps_job.main(str(small.path), str(tmp_path / "one.json"), [*SMALL, *given])
    alone = json.loads((tmp_path / "one.json").read_text())
    many = steps(ranks, small, tmp_path / "many.json", 2, *given)
    np.testing.assert_allclose(many["losses"], alone["losses"], rtol=1e-4, atol=1e-6)


def test_a_dense_part_in_slices_learns_alike(ranks, small: PreparedData, tmp_path: Path, one: dict[str, dict]) -> None:  # type: ignore[no-untyped-def]
    """FSDP: the same losses, clipping included."""
    many = steps(ranks, small, tmp_path / "many.json", 4, "distributed.dense=fsdp", "loss.negatives=16")
    np.testing.assert_allclose(many["losses"], one["16"]["losses"], rtol=1e-4)


@pytest.mark.parametrize(
    ("count", "settings"),
    [
        (2, ("distributed.sharding=row_wise",)),
        (4, ("distributed.sharding=table_wise", "distributed.dense=fsdp")),
    ],
)
def test_ranks_that_send_half_the_bytes_learn_nearly_alike(  # type: ignore[no-untyped-def]
    ranks, small: PreparedData, tmp_path: Path, one: dict[str, dict], count: int, settings: tuple[str, ...]
) -> None:
    """bf16 has 8 bits: losses differ, by less than 1 %. Ids, lengths and what tells candidates apart stay whole."""
    settings = (*settings, "loss.negatives=16")
    whole = steps(ranks, small, tmp_path / "fp32.json", count, *settings)
    half = steps(ranks, small, tmp_path / "bf16.json", count, *settings, "distributed.collectives=bf16")
    assert half["collectives"] == whole["collectives"]
    for part in ("tables", "dense", "loss"):
        assert half["bytes"][part] < 0.7 * whole["bytes"][part]
    np.testing.assert_allclose(half["losses"], one["16"]["losses"], rtol=1e-2)
    assert np.abs(np.array(half["losses"]) / np.array(one["16"]["losses"]) - 1).max() > 1e-4
    assert np.mean(np.array(half["ranks"]) == np.array(one["16"]["ranks"])) > 0.5


def test_one_rank_sends_nothing_and_rounds_nothing(small: PreparedData, tmp_path: Path, one: dict[str, dict]) -> None:
    output = tmp_path / "one.json"
    steps_job.main(str(small.path), str(output), [*SMALL, "loss.negatives=16", "distributed.collectives=bf16"])
    assert json.loads(output.read_text())["losses"] == one["16"]["losses"]


FLM = ["-m", "flm_torchrec", "--"]


def test_a_run_of_two_ranks_is_evaluated_alike_by_one_two_and_four(ranks, small: PreparedData, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """One checkpoint, written in slices by FSDP; three world sizes, with and without FSDP: every metric of every row to
    the last digit."""
    run = tmp_path / "run"
    options = [f"--{pair}" for pair in (*SMALL, "distributed.dense=fsdp", "distributed.sharding=row_wise")]
    ranks(2, [*FLM, "train", f"--data.path={small.path}", f"--train.run={run}", "--train.epochs=2",
              "--eval.user_block=16", "--eval.item_block=64", *options])  # fmt: skip
    found, config = [], (run / "config.yaml").read_text()
    assert "dense: fsdp" in config
    for count, dense in ((2, "fsdp"), (1, "fsdp"), (4, "ddp")):
        (run / "config.yaml").write_text(config.replace("dense: fsdp", f"dense: {dense}"))
        ranks(count, [*FLM, "evaluate", "--run", str(run), "--against", str(run)])
        found.append(json.loads((run / "evaluation-test.json").read_text()))
    assert found[0] == found[1] == found[2]
    assert found[0]["users"] == 120
    # A run differs in nothing from itself.
    rows = found[0]["comparison"]["rows"]
    assert {"fused", "sequential"} <= set(rows) and rows["fused"]["ndcg@10"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
