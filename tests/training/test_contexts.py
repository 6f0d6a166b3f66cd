"""Features of events: from columns of the log to the history that the sequential head reads."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

import flm_torchrec as flm
from flm_torchrec.cli import main
from flm_torchrec.config import load_config
from flm_torchrec.data.collate import Assembler
from flm_torchrec.data.dataset import PreparedData, load_prepared
from flm_torchrec.data.feature_values import describe
from flm_torchrec.data.negatives import Negatives
from flm_torchrec.data.vocabulary import RowKeys, match_rows
from flm_torchrec.errors import FlmError
from flm_torchrec.privacy.forget_in_data import replaced_values
from flm_torchrec.training.checkpoint import storage
from flm_torchrec.training.follow.events import EventEncoder, RowForm, append, newest
from flm_torchrec.training.follow.growth import followed_data
from flm_torchrec.training.job import Job, open_job
from tests.training.contexts import FEATURES, WITH_WEIGHTS, with_contexts
from tests.training.test_event_kinds import OPTIONS, ROLES, SMALL, USERS, log

CODED = "categorical"


@pytest.fixture(scope="module")
def data(contextual: PreparedData) -> PreparedData:
    return contextual


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
    assembler = Assembler(data, job.events.learned_from, job.train_stats, sketches=job.loader.assembler.sketches)
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
    flm.prepare(changed, tmp_path / "new", columns=WITH_WEIGHTS, event_features=FEATURES, min_count=2)
    old, new = (RowKeys.load(folder) for folder in (data.path, tmp_path / "new"))
    match = match_rows(old, new, "event_device", ["device"])
    assert match.origin is not None and match.origin.tolist() == [0, 2, 3, -1] and (match.kept, match.new) == (2, 1)


def test_names_that_cannot_be_those_of_features_are_refused(tmp_path: Path) -> None:
    for given, told in (
        ({"hour": "numeric"}, "'hour' is numeric; of events only categorical features are learnt"),
        ({"gap": "categorical"}, "'gap' is taken"),
        ({"weight": "categorical"}, "'weight' is taken"),
        ({"user_id": "categorical"}, "'user_id' cannot name a feature"),
        ({"devise": "categorical"}, "devise"),
        ({"device": "categorical", "Device": "categorical"}, "differs from another in capitals alone"),
    ):
        with pytest.raises(FlmError, match=told):
            flm.prepare(with_contexts(), tmp_path / "wrong", columns=WITH_WEIGHTS, event_features=given)
        assert not (tmp_path / "wrong").exists()


def test_numbers_are_the_text_that_they_have_in_json(tmp_path: Path) -> None:
    hours = np.resize([14.0, 7.5, np.nan, 20.0], USERS * 12)
    timed = with_contexts().with_columns(hour=pl.Series(hours), day=pl.Series(np.resize([3, 4], USERS * 12)))
    flm.prepare(timed, tmp_path / "data", columns=WITH_WEIGHTS, event_features=dict.fromkeys(("hour", "day"), CODED))
    values = {
        n: pl.read_parquet(tmp_path / f"data/vocab/event_{n}.parquet")["value"].to_list() for n in ("hour", "day")
    }
    assert values == {"hour": ["14", "20", "7.5"], "day": ["3", "4"]}
    listed = timed.with_columns(hour=pl.Series([["14"]] * len(timed)))
    with pytest.raises(FlmError, match="hour"):
        flm.prepare(listed, tmp_path / "wrong", columns=WITH_WEIGHTS, event_features={"hour": CODED})


@dataclass(frozen=True)
class Followed:
    """Data of the first events of each user, a run of them, and a follower of it that has learnt the others."""

    folder: Path
    later: list[dict[str, Any]]
    """The rows that were followed."""

    @property
    def data(self) -> PreparedData:
        return load_prepared(self.folder / "data")

    def follow(self) -> int:
        names = [f"--{name}={self.folder / name}" for name in ("run", "source")]
        more = ["--output", str(self.folder / "live"), "--once", "--columns", "device=dev,weight=w"]
        return main(["follow", *names, *more])


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Followed:
    """User u3 alone was ever on a boat."""
    folder = tmp_path_factory.mktemp("followed")
    boat = pl.when(pl.col("user_id") == "u3").then(pl.lit("boat")).otherwise("place").alias("place")
    log = with_contexts().with_columns(boat).sort("timestamp", maintain_order=True)
    place = pl.int_range(pl.len()).over("user_id")
    first, later = log.filter(place < 9), log.filter(place >= 9).rename({"device": "dev", "weight": "w"})
    names = {"user_id": "user", "item_id": "item"}
    for name, rows in (("data", first), ("whole", log)):
        flm.prepare(rows, folder / name, columns=WITH_WEIGHTS, event_features=FEATURES, min_count=2)
    assert main(["train", "--data.path", str(folder / "data"), "--train.run", str(folder / "run"), *OPTIONS]) == 0
    (folder / "source").mkdir()
    found = Followed(folder, later.rename(names).to_dicts())
    lines = [*map(json.dumps, found.later), *WRONG]
    (folder / "source" / "a.jsonl").write_text("\n".join(lines) + "\n")
    assert found.follow() == 0
    return found


EVENT = '{"user": "u1", "item": "i1", "timestamp": 2000000, "event": "buy", '
WRONG = [
    EVENT + '"w": 1, "dev": ["tv", "tv"]}',
    EVENT + '"w": 1, "place": {"home": 1}}',
    EVENT + '"dev": "tv"}',
    EVENT + '"w": -1, "dev": "tv"}',
    EVENT + '"w": NaN, "dev": "tv"}',
]
"""Rows that are refused: lists as contexts, and no weights."""


def test_followed_contexts_and_weights_are_those_of_preparation(followed: Followed) -> None:
    data, whole = followed.data, load_prepared(followed.folder / "whole")
    form = RowForm({"device": "dev", "weight": "w"})
    encoder = EventEncoder(followed.folder / "run" / "vocabulary", form)
    new = encoder.encode([("", row) for row in followed.later], {})
    grown, learned_from, is_new = append(data, np.ones(len(data.item), bool), new)
    for name in ("offsets", "item", "timestamp", "event", "value", "weight", "context"):
        np.testing.assert_array_equal(getattr(grown, name), getattr(whole, name), name)
    assert is_new.sum() == len(followed.later) == 3 * USERS and (new.context >= 0).any()
    shorter, _ = newest(grown, learned_from, 4)
    assert shorter.weight is not None and len(shorter.weight) == len(shorter.context) == 4 * USERS
    user = np.arange(USERS)
    drawn = Negatives(whole.item_counts(learned_from), 5, 1.0).draw(np.random.default_rng(0), 0, 1)
    batches = [
        Assembler(of, learned_from).training(user, of.offsets[:-1] + 5, of.offsets[1:], drawn) for of in (grown, whole)
    ]
    for key in ("device", "place"):
        assert torch.equal(*(batch.history[key].values() for batch in batches))
    weights = [batch.weight for batch in batches]
    assert weights[0] is not None and weights[1] is not None and torch.equal(weights[0], weights[1])
    unseen = [("", {**row, "dev": value}) for row, value in zip(followed.later, ("moon", None, "", 7), strict=False)]
    assert encoder.encode(unseen, {}).context[:, 0].tolist() == [-1] * 4
    assert encoder.ids.left_out == [f"context.device: '{value}' was not in training" for value in ("moon", "7")]
    blanks = [{**followed.later[0], "dev": text, "w": " 1.5"} for text in ("tv", " tv ", " ")]
    encoded = encoder.encode([("", row) for row in blanks], {})
    assert encoded.context[0, 0] == encoded.context[1, 0] >= 0 > encoded.context[2, 0]
    assert encoded.weight.tolist() == [1.5] * 3 and len(encoder.ids.left_out) == 2


def test_a_follower_keeps_contexts_and_weights(followed: Followed, capsys: pytest.CaptureFixture[str]) -> None:
    report = json.loads((followed.folder / "live" / "follow.json").read_text())
    reasons = {reason: entry["rows"] for reason, entry in report["refused"].items()}
    assert report["events"] == 3 * USERS and reasons.pop("a list as a context") == 2
    assert list(reasons.values()) == [3] and "weight missing" in next(iter(reasons))
    part = pl.read_parquet(followed.folder / "live" / "events" / "part-000000.parquet")
    assert part.columns[-3:] == ["weight", "context_device", "context_place"] and part["weight"].n_unique() == 5
    stranger = {"user": "new", "item": "i1", "timestamp": 3_000_000, "event": "buy", "w": 2, "dev": "tv"}
    (followed.folder / "source" / "b.jsonl").write_text(json.dumps(stranger) + "\n")
    assert followed.follow() == 0  # from the state, whose events are read again
    run = str(followed.folder / "run")
    wrong = ["--source", run, "--output", str(followed.folder / "x"), "--once", "--columns", "devise=dev"]
    assert main(["follow", "--run", run, *wrong]) == 2 and "did you mean 'device'?" in capsys.readouterr().err
    last = part.filter(pl.col("user") == 0).sort("timestamp")
    contexts = last.select("context_device", "context_place").to_numpy()
    data = load_prepared(followed.folder / "data", on_disk=True)
    known = followed_data(followed.folder / "live", data, {"parts": 2, "growths": 1, "expire_after": 0})
    assert known.weight is not None
    own, new = slice(known.offsets[1] - 3, known.offsets[1]), slice(known.offsets[USERS], known.offsets[USERS + 1])
    np.testing.assert_array_equal(known.context[own], contexts)
    assert known.weight[own].tolist() == last["weight"].to_list()
    assert known.context[new].tolist() == [[2, -1]] and known.weight[new].tolist() == [2]
    assert describe(known.path, known.schema.of("event", sparse=True)[0])["values"] == ["laptop", "phone", "tv"]


def test_forgetting_takes_out_contexts_that_nobody_else_has(followed: Followed, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(followed.folder, folder)
    for run in ("run", "live"):
        config = folder / run / "config.yaml"
        config.write_text(config.read_text().replace(str(followed.folder), str(folder)))
    state = storage.read_all(folder / "run/checkpoints/best")
    (name,) = (name for name in state if name.endswith("event_place.weight") and name.startswith("model."))
    for run in ("run", "live"):
        for checkpoint in (folder / run / "checkpoints").iterdir():
            state = storage.read_all(checkpoint)
            state[name].fill_(0.5)
            storage.write(checkpoint, state, storage.read_meta(checkpoint), None)
    runs = ["--run", str(folder / "run"), "--run", str(folder / "live")]
    assert main(["forget", "--data", str(folder / "data"), "--user", "u3", *runs]) == 0
    shutil.rmtree(folder / "source")
    shutil.rmtree(folder / "whole")
    before = load_prepared(followed.folder / "data")
    after = load_prepared(folder / "data")
    others = before.event_users() != 3
    np.testing.assert_array_equal(after.context, before.context[others])
    assert after.weight is not None and before.weight is not None
    np.testing.assert_array_equal(after.weight, before.weight[others])
    values = ["away", "forgotten-1", "home"]
    for vocabulary in ("data/vocab", "run/vocabulary/vocab", "live/vocabulary/vocab"):
        assert pl.read_parquet(folder / vocabulary / "event_place.parquet")["value"].to_list() == values
    assert replaced_values(folder / "data") == {"device": {}, "place": {1: "forgotten-1"}}  # for exports
    assert [str(f) for f in folder.rglob("*") if f.is_file() and b"boat" in f.read_bytes()] == []
    for checkpoint in (*(folder / "run/checkpoints").iterdir(), *(folder / "live/checkpoints").iterdir()):
        rows = storage.read_all(checkpoint)[name]
        assert not rows[2].any() and rows[[1, 3]].all()
    assert not (pl.read_parquet(folder / "live/events/part-000000.parquet")["user"] == 3).any()


def test_joined_contexts_are_matched_by_value(data: PreparedData, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    changed = with_contexts().with_columns(pl.col("device").replace({"laptop": "watch"}))
    other = tmp_path / "shop"
    flm.prepare(changed, other, columns=ROLES, event_features={"device": CODED}, min_count=2)
    flm.prepare(log(), plain, columns=ROLES)
    shutil.copytree(data.path, tmp_path / "books")
    folders = [str(tmp_path / name) for name in ("books", "plain", "shop")]
    for apart, names in ((), ["laptop", "phone", "tv", "watch"]), (("--apart", "device"), None):
        output = tmp_path / f"joint{len(apart)}"
        assert main(["join", *folders, "--output", str(output), *apart]) == 0
        joint = load_prepared(output)
        values = {n: pl.read_parquet(output / f"vocab/event_{n}.parquet")["value"].to_list() for n in FEATURES}
        if names is not None:
            assert values == {"device": names, "place": ["away", "home"]}
        assert joint.item_domain is not None and joint.weight is not None and data.weight is not None
        domain = joint.item_domain[joint.item]
        for number, source in ((0, data), (2, load_prepared(other))):
            own = [f.name for f in source.schema.of("event", sparse=True)]
            assert Counter(shown(joint, values, domain == number)) == Counter(
                shown(source, _values(source, f"{joint.schema.domains[number]}/" if apart else ""), slice(None), own)
            )
        assert (joint.context[domain == 1] == -1).all() and (joint.weight[domain != 0] == 1).all()
        np.testing.assert_array_equal(np.sort(joint.weight[domain == 0]), np.sort(data.weight))
    with open_job(load_config(None, [*SMALL, f"data.path={output}"])) as job:
        assert torch.isfinite(job.model(next(job.loader.epoch(0)))[0])


def _values(data: PreparedData, before: str) -> dict[str, list[str]]:
    features = data.schema.of("event", sparse=True)
    found = {f.name: pl.read_parquet(data.path / f"vocab/event_{f.name}.parquet")["value"].to_list() for f in features}
    return {name: [before + v if name == "device" else v for v in values] for name, values in found.items()}


def shown(
    data: PreparedData, values: dict[str, list[str]], rows: Any, names: Sequence[str] = tuple(FEATURES)
) -> list[tuple[int, tuple[str | None, ...]]]:
    """Time and the values of the contexts of each of the rows, in the order of FEATURES."""
    codes = dict(zip(names, data.context[rows].T, strict=True))
    columns = [
        [values[n][c] if c >= 0 else None for c in codes[n]] if n in codes else [None] * len(data.timestamp[rows])
        for n in FEATURES
    ]
    return list(zip(data.timestamp[rows].tolist(), zip(*columns, strict=True), strict=True))
