"""In what context events happened: the packaged tower and the service take it as the model does, and stores keep it."""

from __future__ import annotations

import json
import shutil
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st

import flm_torchrec as flm
from flm_torchrec.cli import main
from flm_torchrec.config.heads import REPRESENTATIONS
from flm_torchrec.data.dataset import PreparedData, load_prepared
from flm_torchrec.data.history import CONTEXT, Events
from flm_torchrec.data.splits import everyone
from flm_torchrec.errors import DataError, FlmError, RunError
from flm_torchrec.export.forget import forget_in_export
from flm_torchrec.export.tower.compiled import compile_tower
from flm_torchrec.export.tower.reader import PackagedTower, TowerQuery
from flm_torchrec.export.tower.writer import _write_histories as write_histories
from flm_torchrec.serve.app import create_app
from flm_torchrec.serve.event_store import EventStore
from flm_torchrec.serve.live_event import LiveEvent
from flm_torchrec.serve.live_store import open_store
from flm_torchrec.serve.messages import Recommend
from flm_torchrec.serve.service import Service
from flm_torchrec.training.job import Job
from tests.serve.serving import post, write_export
from tests.serve.test_event_store import address  # noqa: F401 (a fixture)

NONE_ADDED = np.zeros((0, 16), np.float32)
SEQUENTIAL = REPRESENTATIONS.index("sequential")


def set_context_tables(job: Job) -> None:
    """Rows as if they were learnt: they begin at zero. Those of unknown values are never read."""
    torch.manual_seed(0)
    for weight in job.model.module.history.state_dict().values():
        weight.local_shards()[0].tensor.normal_()


@dataclass(frozen=True)
class Exported:
    """An export and the model's own vectors."""

    folder: Path
    users: np.ndarray  # [users, heads + 1, S]
    tower: PackagedTower


@pytest.fixture(scope="module")
def made(contextual: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Of data whose events have contexts and weights."""
    folder = tmp_path_factory.mktemp("contexts") / "one"
    found: list[np.ndarray] = []

    def change(job: Job) -> None:
        set_context_tables(job)
        vectors = job.encoder(everyone(contextual)).users(np.arange(contextual.schema.users))
        found.append(torch.stack([vectors[head] for head in REPRESENTATIONS], 1).numpy())

    write_export(contextual, folder, change=change, precision="fp32")
    return Exported(folder, found[0], PackagedTower(folder))


@pytest.fixture(scope="module")
def service(made: Exported) -> Service:
    return Service(made.folder)


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[TestClient]:
    with TestClient(create_app(service), raise_server_exceptions=False) as client:
        yield client


def known(tower: PackagedTower, users: range) -> np.ndarray:
    found = tower.represent([TowerQuery(tower.known_history(u), u) for u in users], NONE_ADDED)
    return np.stack([one.heads for one in found])


def test_the_packaged_tower_gives_the_vectors_of_the_model(contextual: PreparedData, made: Exported) -> None:
    users = range(contextual.schema.users)
    np.testing.assert_allclose(known(made.tower, users), made.users, atol=2e-5)
    for user in (0, 7):
        history = made.tower.known_history(user)
        last = slice(contextual.offsets[user + 1] - len(history), contextual.offsets[user + 1])
        np.testing.assert_array_equal(history.context, contextual.context[last])
        others = replace(history, context=np.full_like(history.context, -1))
        (seen,), (unseen,) = (made.tower.represent([TowerQuery(h, user)], NONE_ADDED) for h in (history, others))
        assert np.abs(seen.heads - unseen.heads)[SEQUENTIAL].max() > 0.01
        same = [head for head in range(len(REPRESENTATIONS) - 1) if head != SEQUENTIAL]
        np.testing.assert_array_equal(seen.heads[same], unseen.heads[same])


@pytest.mark.slow
def test_the_compiled_tower_gives_them_too(made: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "compiled for this machine" in compile_tower(made.folder)
    tower = PackagedTower(made.folder)
    assert tower.compiled and not made.tower.compiled
    np.testing.assert_allclose(known(tower, range(len(made.users))), made.users, atol=2e-5)


def test_histories_of_events_on_disk_are_those_in_memory(contextual: PreparedData, tmp_path: Path) -> None:
    write_histories(contextual, 5, tmp_path / "memory")
    write_histories(load_prepared(contextual.path, on_disk=True), 5, tmp_path / "disk")
    assert (tmp_path / "memory").read_bytes() == (tmp_path / "disk").read_bytes()
    last = pl.read_parquet(tmp_path / "disk")["context_place"].to_list()
    assert last[3] == contextual.context[contextual.offsets[4] - 5 : contextual.offsets[4], 1].tolist()


@pytest.mark.slow
def test_onnx_takes_contexts(made: Exported, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from flm_torchrec.export.tower.onnx import write_onnx
    from flm_torchrec.export.tower.programs import UserInputs

    folder = tmp_path / "tower"
    shutil.copytree(made.folder / "tower", folder)
    write_onnx(folder)
    session = onnxruntime.InferenceSession(str(folder / "user.onnx"), providers=["CPUExecutionProvider"])
    assert [one.name for one in session.get_inputs()] == list(UserInputs._fields)
    for count, longest in ((1, 1), (4, 7)):
        inputs = made.tower._made_up(np.random.default_rng(count), count, longest)
        given = {name: tensor.numpy() for name, tensor in zip(UserInputs._fields, inputs, strict=True)}
        assert given["context"].shape == (count, longest, 2)
        for one, other in zip(session.run(None, given), made.tower.user(*inputs), strict=True):
            np.testing.assert_allclose(one, other.numpy(), atol=1e-4)


CONTEXTS = st.dictionaries(st.sampled_from(["device", "place"]), st.sampled_from(["phone", "tv", "home", "moon", None]))


@settings(max_examples=15)
@given(st.lists(st.tuples(st.integers(0, 29), CONTEXTS), min_size=1, max_size=9))
def test_a_history_with_contexts_is_answered_as_the_tower_says(
    service: Service, events: list[tuple[int, dict[str, str | None]]]
) -> None:
    loaded = service.loaded
    asked = [{"item": f"i{item}", "context": context} for item, context in events]
    request = {"history": asked, "k": 30, "head": "sequential", "exclude_seen": False}
    (answer,) = service.recommend([Recommend.model_validate(request)])
    assert isinstance(answer, dict)
    codes = {f.name: f.codes for f in loaded.tower.contexts}
    contexts = [[codes[name].get(context.get(name) or "", -1) for name in codes] for _, context in events]
    n = len(events)
    history = Events(
        np.array([loaded.row(f"i{item}") for item, _ in events], np.int64),
        np.arange(n) * loaded.tower.usual_gap,
        np.zeros(n, np.int64),
        np.ones(n, np.float32),
        context=np.array(contexts, np.int32),
    )
    (found,) = loaded.represent([TowerQuery(history)])
    wanted = loaded.catalogue.vectors(np.arange(len(loaded.catalogue))) @ found.heads[SEQUENTIAL]
    served = scores(answer)
    assert [served[loaded.key(row)] for row in range(len(wanted))] == pytest.approx(wanted.tolist(), abs=1e-5)
    unknown = [value for _, context in events for name, value in context.items() if value and value not in codes[name]]
    assert len(answer.get("left_out", [])) == len(unknown)


def scores(answer: dict[str, Any]) -> dict[str, float]:
    return {item["item"]: item["score"] for item in answer["items"]}


def test_live_events_keep_their_context(
    service: Service, client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "live.sqlite"
    monkeypatch.setattr(service, "store", open_store(str(store)))
    contexts: list[dict[str, Any]] = [{"device": "tv", "place": "home"}, {}, {"device": "watch"}, {"place": None}]
    for number, context in enumerate(contexts):
        answer = post(client, "/v1/events", user="new", item=f"i{number}", context=context, timestamp=10 + number)
        left_out = ["context.device: 'watch' was not in training"] if number == 2 else None
        assert answer.get("left_out") == left_out and answer["live_events"] == number + 1
    live = post(client, "/v1/recommend", user="new", head="sequential")
    history = [{"item": f"i{n}", "context": context, "timestamp": 10 + n} for n, context in enumerate(contexts)]
    asked = post(client, "/v1/recommend", history=history, head="sequential")
    assert scores(live) == pytest.approx(scores(asked), abs=1e-5) and len(asked["left_out"]) == 1
    shown = client.get("/v1/events", params={"user": "new"}).json()
    assert [event["context"] for event in shown] == [contexts[0], {}, {}, {}]
    assert client.get("/v1/catalogue").json()["contexts"] == {
        "device": ["laptop", "phone", "tv"],
        "place": ["away", "home"],
    }
    monkeypatch.setattr(service, "store", open_store(str(store)))
    (again,) = service.recommend([Recommend(user="new", head="sequential")])
    assert isinstance(again, dict) and scores(again) == pytest.approx(scores(live), abs=1e-5)
    assert [event.context for event in open_store(str(store)).events_of("new", 9)][2] == {"device": "watch"}


@pytest.mark.parametrize(
    ("context", "told"),
    [
        ({"devise": "tv"}, "history.1.context: no event feature 'devise'; did you mean 'device'?"),
        ({"device": 1.5}, "history.1.context.device"),
        ({"device": True}, "history.1.context.device"),
        ({"device": ["tv"] * 1000}, "history.1.context.device"),
        ({"device": "x" * 513}, "history.1.context.device"),
        ({f"name{n}": "x" for n in range(101)}, "history.1.context"),
        (["tv"], "history.1.context"),
        ("tv", "history.1.context"),
    ],
)
def test_a_wrong_context_is_refused_in_one_line(context: Any, told: str, client: TestClient) -> None:
    answer = client.post("/v1/recommend", json={"history": [{"item": "i1"}, {"item": "i2", "context": context}]})
    assert answer.status_code == 422 and told in answer.json()["detail"] and "\n" not in answer.json()["detail"]
    event = client.post("/v1/events", json={"user": "u1", "item": "i2", "context": context})
    assert event.status_code == 422 and told.removeprefix("history.1.") in event.json()["detail"]


def test_a_number_that_is_none_is_refused(client: TestClient) -> None:
    body = b'{"user": "u1", "item": "i2", "context": {"device": NaN}}'
    answer = client.post("/v1/events", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 422) and "\n" not in answer.json()["detail"]
    assert post(client, "/v1/events", user="unheard", item="i2", context={"device": 7})["left_out"]  # 7 is a text


def test_every_store_keeps_contexts(address: str) -> None:  # noqa: F811
    store, contexts = open_store(address), [{"device": "tv", "ört": 'a"\\\0é'}, {}, {"device": ""}]
    with store.writing() as transaction:
        for n, context in enumerate(contexts):
            transaction.add_event("u", LiveEvent(f"i{n}", "view", 1.0, n, "x", context))
        assert [event.context for event in transaction.events_of("u", 9)] == contexts
    assert [event.context for event in store.events_of("u", 9)] == contexts
    assert [event.context for event in store.log(0, 9)] == contexts
    assert store.forget(["u"]) == {"u": 3} and store.log(0, 9) == []


def test_stores_of_older_versions_get_the_column(tmp_path: Path) -> None:
    file = tmp_path / "old"
    EventStore(file).close()
    connection = sqlite3.connect(file)
    connection.execute("ALTER TABLE events DROP COLUMN context")
    columns = "user, item, event, value, timestamp, export, received"
    old = f"INSERT INTO events ({columns}) VALUES ('u', ?, 'view', 1, 7, 'x', {int(time.time())})"
    connection.execute(old, ["i1"])
    connection.commit()
    first, second = EventStore(file), EventStore(file)
    connection.execute(old, ["i2"])  # an older version goes on with it
    connection.commit()
    with second.writing() as transaction:
        transaction.add_event("u", LiveEvent("i3", "view", 1.0, 7, "x", {"device": "tv"}))
    assert [(e.item, e.context) for e in first.events_of("u", 9)] == [("i1", {}), ("i2", {}), ("i3", {"device": "tv"})]


def test_the_log_has_a_column_for_each_feature_that_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = EventStore(tmp_path / "s")
    with store.writing() as transaction:
        for n, context in enumerate([{"device": "tv"}, {}, {"device": "phone", "place": "home"}]):
            transaction.add_event("u", LiveEvent(f"i{n}", "view", 1.0, n, "x", context))
    store.close()
    export = ["export-events", "--events", str(tmp_path / "s"), "--output", str(tmp_path / "log")]
    assert main([*export, "--event-features", "device"]) == 0
    told = capsys.readouterr().out
    assert "1 of them have a place, which is not written; name it with --event-features place" in told
    assert pl.read_parquet(tmp_path / "log" / "*.parquet")["device"].to_list() == ["tv", None, "phone"]
    for wrong, reason in (("item", "is a column that every event has"), ("device,device", "is named twice")):
        assert main([*export[:-1], str(tmp_path / "other"), "--event-features", wrong]) == 2
        assert reason in capsys.readouterr().err and not (tmp_path / "other").exists()


def test_a_history_of_the_api_has_contexts(made: Exported, client: TestClient) -> None:
    recommender = flm.Recommender(made.folder)
    recommender.__dict__["tower"] = made.tower  # which takes seconds to read
    rows = {
        "user": ["a", "b", "a"],
        "item": ["i1", "i2", "i3"],
        "timestamp": [0, 5, 60],
        "device": ["tv", None, "moon"],
    }
    table = recommender.recommend(pl.DataFrame(rows), k=5, head="sequential", include_seen=True)
    events = [{"item": "i1", "timestamp": 0, "context": {"device": "tv"}}, {"item": "i3", "timestamp": 60}]
    served = post(client, "/v1/recommend", history=events, k=5, head="sequential", exclude_seen=False)
    assert table.filter(pl.col("user") == "a")["item"].to_list() == [item["item"] for item in served["items"]]
    for column, value in (("devise", "tv"), ("device", ["tv"])):
        with pytest.raises(FlmError, match="dev"):
            recommender.recommend(pl.DataFrame({**rows, column: [value] * 3}), k=5)


@pytest.mark.slow
def test_forgotten_users_and_values_leave_the_export(made: Exported, tmp_path: Path) -> None:
    folder = tmp_path / "one"
    shutil.copytree(made.folder, folder)
    before = made.tower
    assert forget_in_export(folder, ["u3"], {"device": {2: "forgotten-2"}}) == 1
    after = PackagedTower(folder)
    assert after.contexts[0].values == ("laptop", "phone", "forgotten-2") and len(after.known_history(3)) == 0
    assert b'"tv"' not in (folder / "tower" / "tower.json").read_bytes()
    history = before.known_history(5)
    for code, same in ((0, True), (1, True), (2, False), (-1, True)):
        of_one = replace(history, context=np.full_like(history.context, -1))
        of_one.context[:, 0] = code
        (old,), (new,) = (tower.represent([TowerQuery(of_one)], NONE_ADDED) for tower in (before, after))
        assert np.array_equal(old.heads, new.heads) == same
    nothing = replace(history, context=np.full_like(history.context, -1))
    (unknown,) = after.represent([TowerQuery(nothing)], NONE_ADDED)
    np.testing.assert_allclose(new_of(after, history, 2), unknown.heads, atol=1e-6)


def new_of(tower: PackagedTower, history: Any, code: int) -> np.ndarray:
    context = np.full_like(history.context, -1)
    context[:, 0] = code
    (found,) = tower.represent([TowerQuery(replace(history, context=context))], NONE_ADDED)
    return found.heads


@pytest.mark.slow
def test_damaged_contexts_are_refused(made: Exported, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    for name, change, told in (
        ("codes", lambda t: t.set_column(4, f"{CONTEXT}device", _plus(t, 9)), "context_device"),
        ("gone", lambda t: t.drop_columns([f"{CONTEXT}device"]), "cannot be read"),
    ):
        folder = tmp_path / name
        shutil.copytree(made.folder / "tower", folder / "tower")
        file = folder / "tower" / "histories.parquet"
        pq.write_table(change(pq.read_table(file)), file)
        with pytest.raises(RunError, match=told):
            PackagedTower(folder)
    with pytest.raises(DataError, match="context: no event feature"):
        made.tower.context({"x": "y"}, "context", [])
    assert json.loads((made.folder / "tower" / "tower.json").read_text())["features"][-1]["entity"] == "event"


def _plus(table: Any, number: int) -> Any:
    import pyarrow as pa

    column = table[f"{CONTEXT}device"].combine_chunks()
    column = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
    return pa.ListArray.from_arrays(column.offsets, pa.array(column.values.to_numpy() + number, pa.int32()))
