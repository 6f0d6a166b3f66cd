"""Features of events: from columns of the log to the history that the sequential head reads."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

import flm_torchrec as flm
from flm_torchrec.cli import main
from flm_torchrec.config import load_config
from flm_torchrec.data.dataset import PreparedData, load_prepared
from flm_torchrec.data.vocabulary import RowKeys, match_rows
from flm_torchrec.errors import FlmError
from flm_torchrec.training.job import Job, open_job
from tests.training.test_event_kinds import OPTIONS, ROLES, SMALL, USERS, log

FEATURES = {"device": "categorical", "place": "categorical"}


def with_contexts() -> pl.DataFrame:
    """The log with devices, of which one is too rare, and places, many of which are unknown."""
    rng = np.random.default_rng(5)
    n = USERS * 12
    device = rng.choice(["phone", "tv", "laptop"], n).tolist()
    device[7] = "fridge"
    place = [
        None if unknown else name
        for name, unknown in zip(rng.choice(["home", "away"], n), rng.random(n) < 0.4, strict=True)
    ]
    return log().with_columns(device=pl.Series(device), place=pl.Series(place, dtype=pl.String))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    folder = tmp_path_factory.mktemp("contexts") / "data"
    flm.prepare(with_contexts(), folder, columns=ROLES, event_features=FEATURES, min_count=2)
    return load_prepared(folder)


def test_codes_are_those_of_the_log(data: PreparedData) -> None:
    rows = with_contexts().sort(pl.col("user_id").str.slice(1).cast(pl.Int64), "timestamp", maintain_order=True)
    assert [f.name for f in data.schema.of("event", sparse=True)] == ["device", "place"]
    for number, name in enumerate(FEATURES):
        values = pl.read_parquet(data.path / "vocab" / f"event_{name}.parquet")["value"].to_list()
        assert values == {"device": ["laptop", "phone", "tv"], "place": ["away", "home"]}[name]
        expected = [values.index(value) if value in values else -1 for value in rows[name]]
        assert data.context[:, number].tolist() == expected
    alone = load_prepared(data.path, ["place"])
    assert alone.context.shape == (USERS * 12, 1) and (alone.context[:, 0] == data.context[:, 1]).all()
    assert load_prepared(data.path, "none").context.shape == (USERS * 12, 0)


def representations(job: Job, data: PreparedData, user: int) -> dict[str, torch.Tensor]:
    """[3, S] what the heads say before each of a user's last three events."""
    from flm_torchrec.data.collate import Assembler

    assembler = Assembler(data, job.events.learned_from, job.train_stats)
    end = int(data.offsets[user + 1])
    job.model.eval()
    found = []
    for shown in (1, 2, 3):
        batch = assembler.encoding(np.array([user]), np.array([end - 4]), np.array([end - 4 + shown]))
        with torch.no_grad():
            encoded = job.model(batch)[1].encoded
        found.append({name: rows[-1] for name, rows in encoded.representations.items()})
    return {name: torch.stack([one[name] for one in found]) for name in found[0]}


def test_an_event_says_its_context_to_later_ones_alone(data: PreparedData) -> None:
    config = load_config(None, [*SMALL, f"data.path={data.path}", "model.dropout=0", "model.embedding_dropout=0"])
    with open_job(config, data) as job:
        table = job.model.module.history.state_dict()["embeddings.event_device.weight"]
        weight = table.local_shards()[0].tensor
        assert weight.shape == (4, 8) and not weight.any()  # what is not learnt says nothing
        batch = next(job.loader.epoch(0))
        job.optimizer.zero_grad()
        job.model(batch)[0].backward()
        job.optimizer.step()
        assert weight[1:].any(1).all() and not weight[0].any()  # unknown stays zero
        weight.normal_()
        end = int(data.offsets[4])
        before = representations(job, data, 3)
        for place, moved in ((end - 1, []), (end - 2, [2]), (end - 3, [1, 2])):
            context = data.context.copy()
            context[place, 0] = (context[place, 0] + 1) % 3
            after = representations(job, replace(data, context=context), 3)
            moves = (after["sequential"] - before["sequential"]).abs().amax(1)  # the last bits may differ by themselves
            differ = (moves > 1e-5).nonzero().flatten().tolist()
            assert differ == moved
            torch.testing.assert_close(after["content"], before["content"])
        unknown = representations(job, replace(data, context=np.full_like(data.context, -1)), 3)
        weight.zero_()
        job.model.module.history.state_dict()["embeddings.event_place.weight"].local_shards()[0].tensor.zero_()
        nothing = representations(job, data, 3)
        torch.testing.assert_close(unknown["sequential"], nothing["sequential"])


def test_streamed_contexts_are_those_in_memory(data: PreparedData) -> None:
    found = []
    for more in ((), ("data.stream=true", "train.eval_users=9")):
        counted: Counter[tuple[int, int]] = Counter()
        with open_job(load_config(None, [*SMALL, f"data.path={data.path}", "data.max_history=20", *more])) as job:
            for batch in job.loader.epoch(0):
                rows = (batch.history["device"].values().tolist(), batch.history["place"].values().tolist())
                counted.update(zip(*rows, strict=True))
        found.append(counted)
    assert found[0] == found[1] and len(found[0]) > 8


def test_rows_move_by_value_to_new_data(data: PreparedData, tmp_path: Path) -> None:
    changed = with_contexts().with_columns(pl.col("device").replace({"laptop": "watch"}))
    flm.prepare(changed, tmp_path / "new", columns=ROLES, event_features=FEATURES, min_count=2)
    old, new = (RowKeys.load(folder) for folder in (data.path, tmp_path / "new"))
    match = match_rows(old, new, "event_device", ["device"])
    assert match.origin is not None and match.origin.tolist() == [0, 2, 3, -1] and (match.kept, match.new) == (2, 1)


def test_what_takes_no_contexts_says_so(data: PreparedData, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*command: str) -> str:
        assert main(list(command)) == 2
        return capsys.readouterr().err

    run, new = tmp_path / "run", tmp_path / "new"
    new.mkdir()
    assert "has features of events, which cannot be joined" in error("join", str(data.path), str(new), "--output", "x")
    assert main(["train", "--data.path", str(data.path), "--train.run", str(run), *OPTIONS]) == 0
    follow = ("follow", "--run", str(run), "--source", str(new), "--output", str(tmp_path / "f"), "--once")
    assert "its events have features, and those of a source have none" in error(*follow)
    export = ("export", "--run", str(run), "--output", str(tmp_path / "e"))
    assert "which the packaged tower does not take; export with --tower none" in error(*export)
    assert main([*export, "--tower", "none", "--index", "none"]) == 0 and not (tmp_path / "f").exists()
    assert "has features of events" in error("forget", "--data", str(data.path), "--user", data.user_keys[0])
    for given, told in (
        ({"hour": "numeric"}, "'hour' is numeric; of events only categorical features are learnt"),
        ({"gap": "categorical"}, "'gap' is taken"),
        ({"user_id": "categorical"}, "'user_id' cannot name a feature"),
        ({"devise": "categorical"}, "devise"),
    ):
        with pytest.raises(FlmError, match=told):
            flm.prepare(with_contexts(), tmp_path / "wrong", columns=ROLES, event_features=given)
        assert not (tmp_path / "wrong").exists()
