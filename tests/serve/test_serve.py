"""The HTTP service against the tower and brute force: answers, cold users and items, live events, hot swaps."""

from __future__ import annotations

import gc
import os
import shutil
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from flm_torchrec.cli import main
from flm_torchrec.data.dataset import PreparedData
from flm_torchrec.data.feature_values import FeatureValues, bucket_names
from flm_torchrec.data.history import Events
from flm_torchrec.export.tower.reader import TowerQuery
from flm_torchrec.serve.app import ServerLimits, create_app
from flm_torchrec.serve.event_store import EventStore, StoreLimits
from flm_torchrec.serve.loaded_export import LoadedExport, load_export
from flm_torchrec.serve.messages import NewEvent, Recommend
from flm_torchrec.serve.resolve import Refused
from flm_torchrec.serve.service import Service
from tests.serve.fake_service import FakeService
from tests.serve.serving import AS_ADMIN, KEYS, known, post, write_export

HOUR = 3600


@pytest.fixture(scope="module")
def exports(small: PreparedData, exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two exports of two models of the same data: `one` with an exact index, `two` with a graph."""
    folder = tmp_path_factory.mktemp("exports")
    shutil.copytree(exported, folder / "one")
    write_export(small, folder / "two", seed=2, index="hnsw")
    return folder


@pytest.fixture(scope="module")
def loaded(exports: Path) -> dict[str, LoadedExport]:
    """Both exports in memory: nothing in them changes, so that tests share them."""
    return {name: load_export(exports / name, 1) for name in ("one", "two")}


@pytest.fixture(params=["one", "two"])
def service(request: pytest.FixtureRequest, exports: Path, loaded: dict[str, LoadedExport]) -> Service:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flm_torchrec.serve.service.load_export", lambda *_: loaded[request.param])
        return Service(exports / request.param)


@pytest.fixture
def client(service: Service) -> Iterator[TestClient]:
    with TestClient(create_app(service), raise_server_exceptions=False) as client:
        yield client


def keys(answer: dict[str, Any]) -> list[str]:
    return [item["item"] for item in answer["items"]]


def brute_force(service: Service, query: TowerQuery, head: int, left: np.ndarray) -> list[float]:
    """Scores of all items of `left` [N] bool, best first."""
    loaded = service.loaded
    (found,) = loaded.represent([query])
    return sorted((loaded.catalogue.vectors(left) @ found.heads[head]).tolist(), reverse=True)


@pytest.mark.parametrize("head", ["content", "collaborative", "sequential", "fused"])
def test_a_known_user_gets_the_best_unseen_items(head: str, service: Service, client: TestClient) -> None:
    answer = post(client, "/v1/recommend", user="u7", head=head, k=20)
    loaded = service.loaded
    left = np.ones(loaded.manifest.items, bool)
    seen = loaded.seen[loaded.user_of["u7"]].as_py()
    left[seen] = False
    want = brute_force(service, known(service, "u7"), loaded.manifest.heads.index(head), left)[:20]
    assert [item["score"] for item in answer["items"]] == pytest.approx(want, abs=1e-6)
    assert not {loaded.key(row) for row in seen} & set(keys(answer))
    item = answer["items"][0]
    assert item["title"] == loaded.title(loaded.catalogue.row_of[item["item"]])
    assert set(item["attributes"]) == {"genre", "brand"}


def test_as_many_come_back_as_are_left(service: Service, client: TestClient) -> None:
    loaded = service.loaded
    seen = len(set(loaded.seen[loaded.user_of["u0"]].as_py()))
    assert len(keys(post(client, "/v1/recommend", user="u0", k=1000))) == loaded.manifest.items - seen
    assert len(keys(post(client, "/v1/recommend", user="u0", k=1000, exclude_seen=False))) == loaded.manifest.items


def test_filters_are_exact(service: Service, client: TestClient) -> None:
    loaded = service.loaded
    genres = loaded.catalogue.attributes["genre"].values.to_pylist()
    brand = loaded.catalogue.attributes["brand"].values[0].as_py()
    for wanted in ({"genre": genres[:2]}, {"genre": genres[:6], "brand": [brand]}, {"genre": genres}):
        answer = post(client, "/v1/recommend", user="u3", k=1000, filter=wanted, exclude_seen=False)
        has = [loaded.attributes(row) for row in range(loaded.manifest.items)]
        rows = [r for r, held in enumerate(has) if all(set(held[f]) & set(v) for f, v in wanted.items())]
        assert sorted(keys(answer)) == sorted(loaded.key(r) for r in rows)
        few = post(client, "/v1/recommend", user="u3", k=3, filter=wanted)
        left = np.isin(np.arange(loaded.manifest.items), rows)
        left[loaded.seen[loaded.user_of["u3"]].as_py()] = False
        want = brute_force(service, known(service, "u3"), 3, left)[:3]
        assert [item["score"] for item in few["items"]] == pytest.approx(want, abs=1e-6)


def test_a_typed_history_is_what_the_tower_makes_of_it(service: Service, client: TestClient) -> None:
    loaded = service.loaded
    rows, start = [3, 44, 9], 1_700_000_000
    events = [
        {"item": loaded.key(r), "event": "view", "value": 2.0, "timestamp": start + n * HOUR}
        for n, r in enumerate(rows)
    ]
    answer = post(client, "/v1/recommend", history=events, k=5)
    times = np.array([start, start + HOUR, start + 2 * HOUR])
    history = Events(np.array(rows), times, np.zeros(3, np.int64), np.full(3, 2.0, np.float32))
    left = ~np.isin(np.arange(loaded.manifest.items), rows)
    want = brute_force(service, TowerQuery(history), 3, left)[:5]
    assert [item["score"] for item in answer["items"]] == pytest.approx(want, abs=1e-6)


def test_cold_users_are_answered_by_features_or_by_nothing(client: TestClient) -> None:
    nothing = post(client, "/v1/recommend", head="content", k=5)
    interested = post(client, "/v1/recommend", head="content", k=5, features={"interests": ["war"], "spending": 9.0})
    assert len(keys(nothing)) == len(keys(interested)) == 5
    assert nothing["items"] != interested["items"]
    told = post(client, "/v1/recommend", features={"interests": ["war", "knitting"]})["left_out"]
    assert told == ["features.interests: 'knitting' was not in training"]


def test_a_cold_item_is_recommended_filtered_and_used_in_histories(service: Service, client: TestClient) -> None:
    loaded = service.loaded
    before = client.get("/health").json()["items"]
    features = {"title": "The Brand New One", "genre": "war"}
    assert post(client, "/v1/items", item="new", title="The Brand New One", features=features)["items"] == before + 1
    everything = post(client, "/v1/recommend", user="u1", k=1000, exclude_seen=False)
    assert "new" in keys(everything) and len(keys(everything)) == before + 1
    content, _ = loaded.tower.content("item", features)
    (found,) = loaded.represent([known(service, "u1")])
    score = next(i["score"] for i in everything["items"] if i["item"] == "new")
    assert score == pytest.approx(float(loaded.tower.scored(content[None])[0] @ found.heads[3]), abs=1e-6)
    assert "new" in keys(post(client, "/v1/recommend", k=1000, filter={"genre": ["war"]}))
    assert "new" not in keys(post(client, "/v1/recommend", k=1000, filter={"genre": ["comedy"]}))
    assert "new" not in keys(post(client, "/v1/recommend", k=1000, history=[{"item": "new"}]))
    assert [i["item"] for i in client.get("/v1/items", params={"query": "brand new"}).json()] == ["new"]
    taken = client.post("/v1/items", json={"item": loaded.key(0), "title": "again"})
    assert (taken.status_code, "is in the catalogue" in taken.json()["detail"]) == (409, True)


def test_room_for_cold_items_is_bounded(exports: Path) -> None:
    service = Service(exports / "one", EventStore(None, StoreLimits(added_items=2)))
    with TestClient(create_app(service)) as client:
        for key in ("a", "b", "a"):
            post(client, "/v1/items", item=key)
        assert client.post("/v1/items", json={"item": "c"}).status_code == 409


def test_an_event_changes_the_next_answer_to_that_of_the_longer_history(service: Service, client: TestClient) -> None:
    loaded = service.loaded
    before = post(client, "/v1/recommend", user="u9", k=10)
    liked = before["items"][0]["item"]
    base = known(service, "u9")
    moment = int(base.history.timestamp[-1]) + HOUR
    told = post(client, "/v1/events", user="u9", item=liked, value=3.0, timestamp=moment)
    assert told["known"] and told["live_events"] == 1
    after = post(client, "/v1/recommend", user="u9", k=10)
    assert liked not in keys(after) and after["items"] != before["items"]
    event = Events(np.array([loaded.row(liked)]), np.array([moment]), np.zeros(1, np.int64), np.full(1, 3, np.float32))
    longer = TowerQuery(base.history + event, base.user)
    left = np.ones(loaded.manifest.items, bool)
    left[[*loaded.seen[loaded.user_of["u9"]].as_py(), loaded.row(liked)]] = False
    want = brute_force(service, longer, 3, left)[:10]
    assert [i["score"] for i in after["items"]] == pytest.approx(want, abs=1e-6)
    early = client.post("/v1/events", json={"user": "u9", "item": liked, "timestamp": moment - 1})
    assert (early.status_code, "before the user's last event" in early.json()["detail"]) == (422, True)


def test_a_new_user_is_known_from_the_first_event_on(client: TestClient) -> None:
    assert client.post("/v1/recommend", json={"user": "stranger"}).status_code == 404
    assert not post(client, "/v1/events", user="stranger", item="i4")["known"]
    assert "i4" not in keys(post(client, "/v1/recommend", user="stranger", k=1000))


def test_live_users_are_forgotten_in_order_of_silence(exports: Path) -> None:
    service = Service(exports / "one", EventStore(None, StoreLimits(live_users=2)))
    with TestClient(create_app(service)) as client:
        for user in ("a", "b", "a", "c"):
            post(client, "/v1/events", user=user, item="i1")
        assert [client.post("/v1/recommend", json={"user": u}).status_code for u in "abc"] == [200, 404, 200]


def test_a_batch_is_answered_as_its_requests_alone(client: TestClient) -> None:
    requests: list[dict[str, Any]] = [{"user": "u1"}, {"history": [{"item": "i3"}], "k": 3}, {"head": "content"}]
    together = post(client, "/v1/recommend/batch", requests=requests)["answers"]
    for answer, request in zip(together, requests, strict=True):
        alone = post(client, "/v1/recommend", **request)
        assert keys(answer) == keys(alone)
        scores = [[i["score"] for i in a["items"]] for a in (answer, alone)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-5)


def test_a_swap_keeps_live_events_and_cold_items_and_lets_the_old_one_go(exports: Path) -> None:
    service = Service(exports / "one")
    with TestClient(create_app(service, ServerLimits(keys=KEYS)), headers=AS_ADMIN) as client:
        post(client, "/v1/items", item="new", features={"genre": "war"})
        post(client, "/v1/events", user="u2", item="new")
        old, rows = weakref.ref(service.loaded), weakref.ref(service.loaded.tower.user)
        answer = post(client, "/v1/swap", export=str(exports / "two"))
        gc.collect()
        assert old() is None and rows() is None
        assert answer["generation"] == 2 and answer["model_version"] == "two"
        everything = post(client, "/v1/recommend", user="u2", k=1000)
        assert everything["model_version"] == "two" and "new" not in keys(everything)
        assert "new" in keys(post(client, "/v1/recommend", user="u3", k=1000))
        told = client.get("/metrics").text
        assert "flm_generation 2.0" in told and "flm_swaps 1.0" in told
        assert 'flm_requests_total{route="/v1/recommend",status="200"} 2.0' in told
        assert client.get("/health").headers["Content-Security-Policy"] == "default-src 'self'"


def test_no_request_fails_or_mixes_generations_while_exports_are_swapped(exports: Path) -> None:
    service = Service(exports / "one")
    failed: list[str] = []
    versions: set[str] = set()
    done = threading.Event()
    with TestClient(create_app(service, ServerLimits(keys=KEYS)), headers=AS_ADMIN) as client:

        def ask(user: int) -> None:
            while not done.is_set():
                response = client.post("/v1/recommend/batch", json={"requests": [{"user": f"u{user}"}] * 3})
                if response.status_code != 200:
                    failed.append(response.text)
                    return
                found = {a["model_version"] for a in response.json()["answers"]}
                if len(found) != 1:
                    failed.append(f"mixed: {found}")
                versions.update(found)

        threads = [threading.Thread(target=ask, args=(user,)) for user in range(3)]
        for thread in threads:
            thread.start()
        for name in ("two", "one", "two"):
            post(client, "/v1/swap", export=str(exports / name))
        done.set()
        for thread in threads:
            thread.join()
    assert failed == [] and versions == {"one", "two"}


def test_an_export_that_cannot_be_served_is_not_swapped_in(exports: Path, tmp_path: Path) -> None:
    service = Service(exports / "one")
    shutil.copytree(exports / "two", exports / "broken", dirs_exist_ok=True)
    (exports / "broken" / "tower" / "user.pt2").write_bytes(b"x")
    with TestClient(create_app(service, ServerLimits(keys=KEYS)), headers=AS_ADMIN) as client:
        for target, status in ((exports / "broken", 422), (exports / "none", 422), (tmp_path, 403)):
            response = client.post("/v1/swap", json={"export": str(target)})
            assert (response.status_code, response.json()["detail"][:7]) == (status, "export:")
        assert post(client, "/v1/recommend", user="u0")["model_version"] == "one"


def test_a_link_that_is_watched_is_followed(exports: Path, capsys: pytest.CaptureFixture[str]) -> None:
    link = exports / "current"
    link.unlink(missing_ok=True)
    link.symlink_to(exports / "one")
    service = Service(link)
    with TestClient(create_app(service, ServerLimits(watch_seconds=0.02))) as client:
        (exports / "next").symlink_to(exports / "two")
        os.replace(exports / "next", link)
        deadline = time.monotonic() + 60
        while service.loaded.number == 1 and time.monotonic() < deadline:
            time.sleep(0.02)
        health = client.get("/health").json()
        assert health["model_version"] == "two"
        line, said = f"swapped: {exports / 'two'}: {health['items']} items, 120 users; model two\n", ""
        while not said and time.monotonic() < deadline:
            said = capsys.readouterr().out
        assert said == line


def test_a_link_is_followed_once_the_store_can_be_read_and_no_other_export_is_loaded(tmp_path: Path) -> None:
    service: Any = FakeService()
    refusals, swapped = [503, 409], threading.Event()

    def swap(export: Path) -> dict[str, Any]:
        if refusals:
            raise Refused(refusals.pop(), "not now")
        swapped.set()
        return {"items": 1, "users": 1, "model_version": "m"}

    service.swap, service.export = swap, tmp_path
    with TestClient(create_app(service, ServerLimits(watch_seconds=0.02))):
        assert swapped.wait(60)


def test_items_of_more_live_events_than_the_tower_reads_are_left_out(exports: Path) -> None:
    service = Service(exports / "one")
    read = service.loaded.tower.max_history + 1
    had = [f"i{n}" for n in range(read + 5)]
    for start in (0, read):
        service.add_events([NewEvent(user="new", item=item) for item in had[start : start + read]])
    (answer,) = service.recommend([Recommend(user="new", k=1000)])
    assert isinstance(answer, dict) and len(answer["items"]) == service.loaded.size - len(had)
    assert set(had).isdisjoint(item["item"] for item in answer["items"])
    assert [event["item"] for event in service.events_of("new")] == had[-read:]


def test_more_than_can_wait_is_told_to_come_again(exports: Path) -> None:
    service = Service(exports / "one")
    blocked, go = threading.Event(), threading.Event()
    answered = service.recommend

    def slow(requests: Any) -> Any:
        blocked.set()
        go.wait(30)
        return answered(requests)

    service.recommend = slow  # type: ignore[method-assign]
    with TestClient(create_app(service, ServerLimits(threads=1, waiting=0))) as client:
        first = threading.Thread(target=lambda: post(client, "/v1/recommend", user="u0"))
        first.start()
        assert blocked.wait(30)
        refused = client.post("/v1/recommend", json={"user": "u0"})
        assert client.get("/health").status_code == 200
        go.set()
        first.join()
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
        assert client.post("/v1/recommend", json={"user": "u0"}).status_code == 200


@pytest.mark.parametrize(
    ("options", "message"),
    [((), "manifest.json: not found; make the export"), (("--port", "70000"), "--port 70000: give 1 … 65535")],
)
def test_what_cannot_be_served_is_one_line(
    options: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--export", str(tmp_path), *options]) == 2
    assert message in capsys.readouterr().err


def test_titles_and_keys_are_found_whatever_the_case(service: Service, client: TestClient) -> None:
    loaded = service.loaded
    title = loaded.title(12)
    assert loaded.key(12) in [i["item"] for i in client.get("/v1/items", params={"query": title.upper()}).json()]
    assert client.get("/v1/items", params={"query": loaded.key(12), "limit": 1}).json()[0]["item"] == loaded.key(12)
    assert client.get("/v1/items", params={"query": "no such title"}).json() == []
    catalogue = client.get("/v1/catalogue").json()
    assert catalogue["events"] == ["view"] and set(catalogue["features"]) == {"genre", "brand"}


def test_a_number_of_a_cold_item_is_shown_as_its_bucket() -> None:
    price = FeatureValues("price", "item", "quantile", values=("-inf", "10.0", "20.5"))
    low, middle, high = bucket_names(price.values)
    assert (low, middle, high) == ("below 10", "10 to below 20.5", "20.5 or more")
    given = (3, 10, 15.5, 99, None)
    assert [price.shown(one, [low, high]) for one in given] == [[low], [middle], [middle], [high], []]
    assert [price.shown(one, ["10.0"]) for one in given] == [["-inf"], ["10.0"], ["10.0"], ["20.5"], []]  # of old
    assert bucket_names(["-inf"]) == ["any number"] and bucket_names([]) == []


def test_cold_items_that_fit_no_more_do_not_stop_a_swap(exports: Path) -> None:
    service = Service(exports / "one")
    brand = next(iter(service.loaded.catalogue.attributes))
    with service.store.writing() as transaction:
        transaction.add_item("misfit", "misfit", {brand: {"no": "text"}})
        transaction.add_item("fits", "fits", {})
    service.swap(exports / "two")
    assert [item.key for item in service.loaded.added.items] == ["fits"]


@pytest.mark.parametrize(
    ("values", "shown"), [(["a", "b", "a"], ["a", "b"]), (["c", "c"], ["c"]), ([], []), (None, [])]
)
def test_a_value_of_an_item_is_shown_once(values: list[str] | None, shown: list[str]) -> None:
    import pyarrow as pa

    from flm_torchrec.export.mapped import IN_MEMORY
    from flm_torchrec.serve.catalogue import Catalogue, _attribute

    lists = pa.array([["b"], values], pa.list_(pa.string()))
    text = pa.array(["x", "y"])
    catalogue = Catalogue(
        text, text, {"x": 0, "y": 1}, np.ones((1, 1), np.float32), np.zeros(2, np.int64),
        {"tags": _attribute(lists, "tags", IN_MEMORY)}, None, "none",
    )  # fmt: skip
    assert catalogue.attributes_of(1) == {"tags": shown}
