"""Training on joint data: a target's candidates, shares of domains, ranking by domain, and the commands."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from flm_torchrec.cli import main
from flm_torchrec.config import load_config
from flm_torchrec.data.dataset import PreparedData, load_prepared
from flm_torchrec.data.domain_shares import check_domains
from flm_torchrec.errors import ConfigError, DataError
from flm_torchrec.evaluation.ranking import RankingProblem, rank_targets
from flm_torchrec.prepare.options import PrepareOptions
from flm_torchrec.prepare.prepare import prepare
from flm_torchrec.prepare.sources import synthetic
from flm_torchrec.training.job import open_job
from flm_torchrec.training.loaders import make_loader
from flm_torchrec.training.run_events import events_of
from tests.steps import losses_of_steps

SMALL = [
    *("model.dim=8", "model.layers=1", "train.batch_size=16", "data.max_history=6", "loss.negatives=12"),
    *("distributed.threads=1", "train.max_steps=3", "train.warmup_steps=1", "train.eval_users=20"),
]
OPTIONS = [text for setting in SMALL for text in (f"--{setting.partition('=')[0]}", setting.partition("=")[2])]


def batches(data: PreparedData, *overrides: str) -> Iterator[object]:
    """Training batches of a config."""
    config = load_config(None, [*SMALL, f"data.path={data.path}", *overrides])
    from flm_torchrec.distributed.comm import Comm

    return make_loader(data, events_of(config, data), config, Comm(0, 1, 1, torch.device("cpu"))).epoch(0)


def losses(data: PreparedData, *overrides: str) -> list[float]:
    """Losses of three steps."""
    with open_job(load_config(None, [*SMALL, f"data.path={data.path}", *overrides]), data) as job:
        return losses_of_steps(job, 3, seed=1)


@pytest.mark.parametrize("negatives", ["12", "all"])
def test_own_candidates_are_fewer_so_the_loss_is_lower(joint: PreparedData, negatives: str) -> None:
    own = losses(joint, f"loss.negatives={negatives}")
    everything = losses(joint, f"loss.negatives={negatives}", "loss.domains=all")
    assert own[0] < everything[0] and np.isfinite([*own, *everything]).all()


def test_one_domain_is_trained_as_without_domains(domain_folders: list[Path]) -> None:
    data = load_prepared(domain_folders[0])
    assert data.item_domain is None
    assert losses(data) == losses(data, "loss.domains=all")


def test_shares_of_domains_are_kept_in_each_epoch(joint: PreparedData) -> None:
    assert joint.item_domain is not None
    domain = joint.item_domain

    def shares(*overrides: str) -> np.ndarray:
        """Of the batches of an epoch, how many targets each domain has."""
        found = np.zeros(2)
        for batch in batches(joint, *overrides):
            found += np.bincount(domain[batch.items[batch.targets].numpy()], minlength=2)  # type: ignore[attr-defined]
        return found / found.sum()

    natural, books, alone = (
        shares(),
        shares("data.domain_weights=books=9,shop=1"),
        shares("data.domain_weights=books=1,shop=0"),
    )
    assert natural[0] < 0.5 < books[0] < alone[0]
    first, again = (next(iter(batches(joint, "data.domain_weights=[books=2, shop=1]"))) for _ in range(2))
    assert torch.equal(first.items, again.items)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("weights", "moved"), [("natural", True), ("books=2,shop=1", False)])
def test_under_weights_each_epoch_cuts_histories_alike(joint: PreparedData, weights: str, moved: bool) -> None:
    overrides = [f"data.path={joint.path}", f"data.domain_weights={weights}"]
    with open_job(load_config(None, [*SMALL, *overrides]), joint) as job:
        assert job.loader.sharing.moved is moved


@pytest.mark.parametrize(
    ("weights", "told"),
    [
        ("books=1", "name each of books, shop once"),
        ("books=1,shop=1,toys=1", "name each of books, shop once"),
        ("books=1,shop=-1", "'shop=-1' is not NAME=WEIGHT"),
        ("books=0,shop=0", "all weights are 0"),
    ],
)
def test_wrong_weights_are_told(joint: PreparedData, weights: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        next(iter(batches(joint, f"data.domain_weights={weights}")))


def test_weights_need_joint_data_in_memory(domain_folders: list[Path]) -> None:
    with pytest.raises(ConfigError, match="has one domain"):
        next(iter(batches(load_prepared(domain_folders[0]), "data.domain_weights=books=1")))
    with pytest.raises(ConfigError, match=r"data\.domain_weights: sequences are chosen among all in memory"):
        load_config(None, ["data.stream=true", "train.eval_users=5", "data.domain_weights=books=1"])


def test_a_domain_without_candidates_is_told(joint: PreparedData) -> None:
    counts = np.ones(joint.schema.items, int)
    assert joint.item_domain is not None
    counts[np.flatnonzero(joint.item_domain == 1)[1:]] = 0
    with pytest.raises(DataError, match="domain 'shop' is left with 1 items"):
        check_domains(joint, counts)


class Biased:
    """Scores the items of the second domain far above the others."""

    names: tuple[str, ...] = ("biased",)
    alike = False

    def __init__(self, data: PreparedData) -> None:
        assert data.item_domain is not None
        noise = torch.rand(data.schema.items, generator=torch.Generator().manual_seed(0))
        self.all = noise + 10 * torch.from_numpy(data.item_domain).float()

    def blocks(self, own: np.ndarray, scored: list[np.ndarray]) -> list[int]:
        return [len(rows) for rows in scored]

    def scores(self, users: int, name: str, start: int, stop: int) -> torch.Tensor:
        return self.all[start:stop].repeat(users, 1)

    def scores_of(self, users: int, name: str, items: torch.Tensor) -> torch.Tensor:
        return self.all[items]


@pytest.mark.parametrize("block", [7, 1000])
def test_only_the_items_of_the_targets_domain_are_ranked(joint: PreparedData, block: int) -> None:
    from flm_torchrec.data.splits import split
    from flm_torchrec.distributed.comm import Comm
    from flm_torchrec.evaluation.ranking import Blocks

    assert joint.item_domain is not None
    examples = split(joint, "leave-one-out", 0.1).test
    scorer = Biased(joint)
    found = rank_targets(
        RankingProblem(joint, examples, Blocks(16, block)), scorer, Comm(0, 1, 1, torch.device("cpu")), top_k=3
    )
    targets = joint.item[examples.end]
    of_target = joint.item_domain[targets]
    assert (joint.item_domain[found.top["biased"]] == of_target[:, None]).all()
    for row in (0, 5, len(targets) - 1):
        start, end = joint.offsets[examples.user[row]], examples.end[row]
        among = set(np.flatnonzero(joint.item_domain == of_target[row])) - set(joint.item[start:end]) | {targets[row]}
        better = [item for item in among if scorer.all[item] >= scorer.all[targets[row]]]
        assert found.ranks["biased"][row] == len(better)


def test_from_two_folders_to_a_recommendation_of_the_other_domain(
    domain_folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, export = tmp_path / "run", tmp_path / "export"
    given = ["--data.path", *map(str, domain_folders), "--train.run", str(run), *OPTIONS]
    assert main(["train", *given]) == 0
    said = capsys.readouterr().out
    assert "; a target is told from the items of its own domain" in said
    capsys.readouterr()
    assert main(["evaluate", "--run", str(run), "--eval.baselines", "popularity", "--against", "popularity"]) == 0
    said = capsys.readouterr().out
    users = len(load_prepared(tmp_path / "run-data").user_keys)
    assert f" events ({users} users), every item of the event's domain ranked" in said
    assert f"bootstrap over {users} users" in said
    tables = json.loads((run / "evaluation-test.json").read_text())
    assert {"books", "shop"} <= set(tables["segments"])
    assert main(["export", "--run", str(run), "--output", str(export), "--index", "flat", "--tower", "none"]) == 0
    capsys.readouterr()
    data = load_prepared(tmp_path / "run-data")
    assert data.item_domain is not None
    alone = next(
        key
        for key, start, end in zip(data.user_keys, data.offsets[:-1], data.offsets[1:], strict=True)
        if (data.item_domain[data.item[start:end]] == 1).all()
    )
    assert main(["recommend", "--export", str(export), "--user", alone, "--domain", "books", "-k", "5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found) == 5 and all(one["item"].startswith("books/") for one in found)
    assert main(["plan", "--data.path", str(tmp_path / "run-data"), "--per-node", "1", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)["report"]["tables"]
    assert next(table["rows"] for table in planned if table["name"] == "item_id") == data.schema.items
    (tmp_path / "events").mkdir()
    follow = ["follow", "--run", str(run), "--source", str(tmp_path / "events"), "--output", str(tmp_path / "followed")]
    assert main(follow) == 2
    assert "is joint data, whose new items would have no domain" in capsys.readouterr().err
    # Again: the joint data are taken as they are; with other data they are refused.
    assert main(["train", *given, "--train.existing", "resume"]) == 0
    other = tmp_path / "shop"
    prepare(synthetic.read(synthetic.Recipe(users=60, items=120, events=9, seed=5)), other, PrepareOptions())
    capsys.readouterr()
    again = ["--data.path", str(domain_folders[0]), str(other), *given[3:], "--train.existing", "resume"]
    assert main(["train", *again]) == 2
    assert "was not made of what" in capsys.readouterr().err


def test_a_path_twice_is_told(domain_folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, run = str(domain_folders[0]), ["--train.run", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as left:
        main(["train", "--data.path", one, "--data.path", str(domain_folders[1]), *run])
    assert left.value.code == 2 and "given twice" in capsys.readouterr().err
    assert main(["train", "--data.path", one, one, *run]) == 2
    error = capsys.readouterr().err
    assert "is given twice; name each folder once" in error and error.count("\n") == 1
    assert not any(tmp_path.iterdir())
