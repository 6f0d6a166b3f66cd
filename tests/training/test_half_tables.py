"""Tables in fp16, and other settings of GPUs: a CPU refuses to learn with them, and reads what has learned."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType as OptimType
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    EmbeddingLocation,
    SplitTableBatchedEmbeddingBagsCodegen,
)

from flm_torchrec.cli import main
from flm_torchrec.data.dataset import PreparedData
from flm_torchrec.training import job
from flm_torchrec.training.checkpoint import storage
from flm_torchrec.training.checkpoint.manager import states_of

SMALL = ["--model.dim", "8", "--model.layers", "1", "--data.max_history", "6", "--train.max_steps", "6"]
FP16 = ["--train.sparse_precision", "fp16"]


def tables(run: Path) -> dict[str, torch.Tensor]:
    """The tables of a run's newest state."""
    stored = storage.read_all(states_of(run)[0])
    return {name: t for name, t in stored.items() if name.startswith("model.") and not name.startswith("model.dense.")}


def test_kernels_for_cpus_lose_small_updates() -> None:
    """Why a CPU refuses: 100 updates of 1e-4 leave a weight of 1 as it is."""
    place = [(1, 8, EmbeddingLocation.HOST, ComputeDevice.CPU)]
    half = {"weights_precision": SparseType.FP16, "optimizer": OptimType.EXACT_SGD, "learning_rate": 1e-4}
    table = SplitTableBatchedEmbeddingBagsCodegen(place, stochastic_rounding=True, **half)
    weights = table.split_embedding_weights()[0]
    weights.fill_(1.0)
    for _ in range(100):
        table(torch.tensor([0]), torch.tensor([0, 1])).sum().backward()
    assert torch.equal(weights, torch.ones_like(weights))


@pytest.fixture(scope="module")
def run(small: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with tables in fp16. It learns by the kernels for CPUs, as none else does."""
    folder = tmp_path_factory.mktemp("half") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "check_device", lambda *_: None)
        assert main(["train", "--data.path", str(small.path), *SMALL, *FP16, "--train.run", str(folder)]) == 0
    return folder


def test_a_run_with_half_tables_is_evaluated_and_exported_on_a_cpu(run: Path, tmp_path: Path) -> None:
    assert {tensor.dtype for tensor in tables(run).values()} == {torch.half}
    assert main(["evaluate", "--run", str(run)]) == 0
    assert main(["export", "--run", str(run), "--output", str(tmp_path / "export")]) == 0
    assert main(["recommend", "--export", str(tmp_path / "export"), "--user", "u0", "-k", "3"]) == 0


def test_a_cpu_reads_what_adam_and_tf32_have_learned(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    settings = (copy / "config.yaml").read_text()
    for old, new in (
        ("sparse_optimizer: rowwise_adagrad", "sparse_optimizer: adam"),
        ("precision: fp32", "precision: tf32"),
    ):
        assert settings.count(f"  {old}\n") == 1
        settings = settings.replace(f"  {old}\n", f"  {new}\n")
    (copy / "config.yaml").write_text(settings)
    assert main(["evaluate", "--run", str(copy)]) == 0


@pytest.mark.parametrize("half", [True, False], ids=["to fp16", "to fp32"])
def test_rows_move_between_precisions(
    run: Path, small: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, half: bool
) -> None:
    """Learning nothing: rate 0."""
    monkeypatch.setattr(job, "check_device", lambda *_: None)
    still = ["--data.path", str(small.path), "--train.warm_start", str(run), "--train.sparse_lr", "0"]
    kept = [*FP16] if half else ["--train.sparse_precision", "fp32"]
    assert main(["train", *still, *kept, "--train.run", str(tmp_path / "next")]) == 0
    before, after = tables(run), tables(tmp_path / "next")
    assert {tensor.dtype for tensor in after.values()} == {torch.half if half else torch.float32}
    for name, tensor in after.items():
        moved = (tensor != 0).any(-1)  # rows that never learned begin anew
        assert moved.any() and torch.equal(tensor[moved].float(), before[name][moved].float())


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("train.sparse_precision=fp16", "train.sparse_precision: fp16 needs a GPU"),
        ("train.sparse_optimizer=adam", "train.sparse_optimizer: 'adam' has no CPU kernel"),
        ("loss.precision=tf32", "loss.precision: tf32 is a precision of GPUs"),
    ],
)
def test_a_cpu_refuses_to_learn_by_settings_of_gpus(
    small: PreparedData, tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str, told: str
) -> None:
    data = ["--data.path", str(small.path), *SMALL]
    assert main(["train", *data, f"--{setting}", "--train.run", str(tmp_path / "refused")]) == 2
    assert told in capsys.readouterr().err and not (tmp_path / "refused").exists()
