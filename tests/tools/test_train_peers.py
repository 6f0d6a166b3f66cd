"""Trainers that tools/benchmarks/train.py compares: what is asked of other libraries, and which rate is the best."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from flm_torchrec.data.dataset import PreparedData
from tools.benchmarks import train
from tools.benchmarks.train_implicit import Implicit
from tools.benchmarks.train_rectools import RecTools

SPEC = {"threads": 1, "dim": 8, "layers": 1, "heads": 2, "dropout": 0.1, "length": 6, "batch_size": 32, "seed": 0}


@pytest.fixture
def file(small: PreparedData, tmp_path: Path) -> str:
    """What the other trainers read."""
    train.write_for_others(small, 6, tmp_path)
    return str(tmp_path / "plain.npz")


def known_and_last(data: PreparedData) -> tuple[list[list[int]], np.ndarray]:
    """Of each user all events but the last two, and the one before the last; items from 1 on."""
    events = [data.item[a:b] + 1 for a, b in zip(data.offsets[:-1], data.offsets[1:], strict=True)]
    return [e[:-2].tolist() for e in events], np.array([e[-2] for e in events])


def found(last: np.ndarray) -> np.ndarray:
    """Lists of ten with the true item first for user 0, third for user 1, and for nobody else."""
    lists = np.zeros((len(last), 10), np.int64)
    lists[0, 0], lists[1, 2] = last[:2]
    return lists


@pytest.mark.parametrize("model", ["ALS", "BPR"])
def test_implicit_goes_on_from_its_model_and_counts_events(
    model: str, small: PreparedData, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    known, last = known_and_last(small)
    fits: list[int] = []

    class Model:
        iterations = 0

        def __init__(self, **settings: Any) -> None:
            assert settings["factors"] == 8 and settings["num_threads"] == 1
            assert settings.get("learning_rate") == (0.3 if model == "BPR" else None)
            # A seed instead would draw the same pairs in each fit.
            assert isinstance(settings["random_state"], np.random.Generator)

        def fit(self, seen: Any, show_progress: bool) -> None:
            assert [sorted(row.indices) for row in seen] == [sorted(set(items)) for items in known]
            fits.append(self.iterations)

        def recommend(self, users: np.ndarray, seen: Any, N: int) -> tuple[np.ndarray, None]:
            assert N == 10 and len(users) == len(last)
            return found(last), None

    modules = {"als": {"AlternatingLeastSquares": Model}, "bpr": {"BayesianPersonalizedRanking": Model}}
    for name, members in modules.items():
        monkeypatch.setitem(sys.modules, f"implicit.{name}", SimpleNamespace(**members))
    monkeypatch.setitem(sys.modules, "threadpoolctl", SimpleNamespace(threadpool_limits=lambda *_: None))
    trainer = Implicit({**SPEC, "file": file, "model": model, "lr": 0.3})
    events = sum(len(set(items)) for items in known)
    assert trainer.steps(3) == (0, 3 * events) and fits == [3]
    assert trainer.validate() == pytest.approx((1 + 0.5) / len(last))


def test_rectools_takes_its_own_steps(small: PreparedData, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    known, last = known_and_last(small)
    weight = torch.nn.Parameter(torch.tensor([1.0]))

    class Module(torch.nn.Module):
        trainer: Any = "attached"
        began = False

        def on_train_start(self) -> None:
            self.began = True

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD([weight], lr=0.5)

        def training_step(self, batch: dict[str, torch.Tensor], number: int) -> torch.Tensor:
            assert self.began and self.trainer is None and self.training
            return weight.sum()

    class Model:
        def __init__(self, get_trainer_func: Callable[[], Any], **settings: Any) -> None:
            assert settings["n_factors"] == 8 and settings["lr"] == 0.3 and settings["session_max_len"] == 6
            assert settings["loss"] == "sampled_softmax" and settings["transformer_layers_type"] == "LiGR"
            assert get_trainer_func() == 0
            self.lightning_model = Module()
            batch = {"y": torch.tensor([[0, 4], [5, 6]])}
            self.data_preparator = SimpleNamespace(get_dataloader_train=lambda: [batch])

        def fit(self, events: pd.DataFrame) -> None:
            assert events["datetime"].is_monotonic_increasing
            assert events.groupby("user_id")["item_id"].agg(list).to_list() == known

        def recommend(self, users: range, data: pd.DataFrame, k: int, filter_viewed: bool) -> pd.DataFrame:
            assert k == 10 and filter_viewed and len(users) == len(last)
            self.lightning_model.eval()
            user, place = np.nonzero(found(last))
            return pd.DataFrame({"user_id": user, "item_id": found(last)[user, place], "rank": place + 1})

    modules: dict[str, dict[str, Any]] = {
        "pytorch_lightning": {"Trainer": lambda max_epochs, **_: max_epochs, "seed_everything": lambda seed: None},
        "rectools.dataset": {"Dataset": SimpleNamespace(construct=lambda events: events)},
        "rectools.models": {"SASRecModel": Model},
        "rectools.models.nn.transformers.ligr": {"LiGRLayers": "LiGR"},
    }
    for name, members in modules.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**members))
    trainer = RecTools({**SPEC, "file": file, "model": "eSASRec", "lr": 0.3})
    assert trainer.validate() == pytest.approx((1 + 0.5) / len(last))
    assert trainer.steps(2) == (4, 6) and weight.item() == 0  # two steps of 0.5


def test_the_rate_that_is_first_at_the_target_is_taken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    closed: list[str] = []

    class Process:
        """NDCG@10 grows by a tenth of the rate at each validation; a step takes a second."""

        def __init__(self, entrant: train.Entrant) -> None:
            self.name, self.rate, self.steps = entrant.name, entrant.spec.get("lr", 0.05), 0

        def ask(self, do: str, count: int = 0) -> train.Answer:
            self.steps += count
            return train.Answer((2 * count, 3 * count) if count else self.rate * self.steps / 10, count, 0)

        def close(self) -> None:
            closed.append(self.name)

    monkeypatch.setattr(train, "TrainerProcess", Process)
    args = Namespace(target=0.03, limit=100, validate_every=1, peer_rates=[0.1, 0.15])
    entrants = [train.Entrant("theirs", "plain", {"lr": 9}), train.Entrant("ours", "ours", {}, validate_every=4)]
    train.quality(args, entrants)
    told = capsys.readouterr()
    assert told.err.splitlines()[1] == "theirs 0.15: 2 sequences, 3 targets, 1.0 s, NDCG@10 0.0150"
    assert told.out.splitlines()[3:] == [
        "| theirs | 0.1 | not in 2 | 4 | 6 | 0.0200 |",
        "| **theirs** | 0.15 | 2.0 | 4 | 6 | 0.0300 |",
        "| **ours** |  | 8.0 | 16 | 24 | 0.0400 |",
    ]
    train.quality(Namespace(**{**vars(args), "limit": 1}), entrants[:1])
    assert "| **theirs** | 0.15 | not in 1 | 2 | 3 | 0.0150 |" in capsys.readouterr().out
    assert closed == ["theirs", "theirs", "ours", "theirs", "theirs"]


@pytest.mark.parametrize(
    ("python", "told"),
    [(sys.executable, "lacks recbole; --help says how"), ("/nowhere/python", "No such file or directory; name the")],
)
def test_an_environment_without_the_library_is_told_before_anything_starts(
    python: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--data", "/nowhere", "--recbole-python", python])
    with pytest.raises(SystemExit) as stopped:
        train.main()
    assert f"--recbole-python {python}: " in str(stopped.value) and told in str(stopped.value)
    assert "\n" not in str(stopped.value)
