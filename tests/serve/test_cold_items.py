"""Cold items: on exports of joint data, where an export in between does not take them, and without a title."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from flm_torchrec.data.dataset import PreparedData
from flm_torchrec.serve.app import create_app
from flm_torchrec.serve.event_log import export_items
from flm_torchrec.serve.event_store import EventStore, StoredItem, StoreError
from flm_torchrec.serve.messages import NewItem, Recommend
from flm_torchrec.serve.resolve import Refused
from flm_torchrec.serve.service import Service
from flm_torchrec.serve.swapping import CanaryTerms
from flm_torchrec.training.follow.item_file import ItemFile
from flm_torchrec.training.follow.item_rows import ItemRows
from tests.serve.serving import post, write_export


@pytest.fixture(scope="module")
def exports(joint: PreparedData, exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`plain` is of one data set, `joint` of two domains, whose attribute `domain` is no feature."""
    folder = tmp_path_factory.mktemp("cold-items")
    shutil.copytree(exported, folder / "plain")
    write_export(joint, folder / "joint")
    return folder


def test_an_export_of_joint_data_takes_cold_items(exports: Path) -> None:
    with TestClient(create_app(Service(exports / "joint")), raise_server_exceptions=False) as client:
        for key in ("shop/new", "new", "toys/new", "books"):
            post(client, "/v1/items", item=key, features={"genre": "war"})
        found = {one["item"]: one["attributes"] for one in client.get("/v1/items", params={"query": "new"}).json()}
        assert {key: attributes["domain"] for key, attributes in found.items()} == {
            "shop/new": ["shop"],
            "new": [],
            "toys/new": [],
        }
        assert all(attributes["genre"] == ["war"] for attributes in found.values())
        of_domain = {
            domain: {i["item"] for i in post(client, "/v1/recommend", k=1000, filter={"domain": [domain]})["items"]}
            for domain in ("books", "shop")
        }
        assert "shop/new" in of_domain["shop"] and "shop/new" not in of_domain["books"]
        refused = client.post("/v1/items", json={"item": "other", "features": {"domain": "shop"}})
        assert refused.status_code == 422 and "no item feature 'domain'" in refused.text


def test_an_export_of_joint_data_takes_up_the_items_of_the_store(exports: Path, tmp_path: Path) -> None:
    store = EventStore(tmp_path / "s")
    plain = Service(exports / "plain", store)
    beside = Service(exports / "joint", store)
    plain.add_item(NewItem(item="new", features={"genre": "war"}))
    for service in (beside, Service(exports / "joint", store)):
        (answer,) = service.recommend([Recommend(k=1000)])
        assert isinstance(answer, dict) and "new" in [item["item"] for item in answer["items"]]
    plain.swap(exports / "joint")
    assert [item.key for item in plain.loaded.added.items] == ["new"]
    plain.swap(exports / "plain")
    assert plain.find_items("new", 1)[0]["attributes"] == {"genre": ["war"], "brand": []}


def test_an_item_that_an_export_in_between_does_not_take_is_there_again(exports: Path, joint: PreparedData) -> None:
    service, key = Service(exports / "plain"), joint.item_keys[0]  # the joint export has it in its catalogue
    service.add_item(NewItem(item=key, features={"genre": "war"}))
    before = service.health()["items"]
    service.swap(exports / "joint")
    assert service.loaded.added.items == ()
    service.swap(exports / "plain")
    assert service.health()["items"] == before
    assert service.find_items(key, 1)[0]["attributes"] == {"genre": ["war"], "brand": []}
    service.swap(exports / "joint")
    service.swap(exports / "plain", CanaryTerms(0.99, time.time() + 600))
    assert service.canary is not None and [item.key for item in service.canary.fresh.added.items] == [key]


def test_a_swap_waits_for_the_store(exports: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service, read = Service(exports / "plain"), EventStore.items_after
    fails = ["now", "then"]

    def sometimes(store: EventStore, seq: int) -> list[StoredItem]:
        if fails:
            raise StoreError(f"events: the store cannot be used {fails.pop()}")
        return read(store, seq)

    monkeypatch.setattr(EventStore, "items_after", sometimes)
    with pytest.raises(Refused, match="the store cannot be used then") as refused:
        service.swap(exports / "joint")
    assert refused.value.status == 503 and service.loaded.folder == exports / "plain"
    service.swaps.follow({"export": str(exports / "joint"), "canary": None})
    assert service.loaded.folder == exports / "joint" and fails == []


def test_the_title_is_the_text_of_the_feature_that_titles_come_from(exports: Path, tmp_path: Path) -> None:
    store, title = EventStore(tmp_path / "s"), "The Brand New One"
    service = Service(exports / "plain", store)
    service.add_item(NewItem(item="by title", title=title))
    service.add_item(NewItem(item="by feature", features={"title": title}))
    service.add_item(NewItem(item="by both", title=title, features={"title": "Another"}))
    for loaded in (service.loaded, Service(exports / "plain", store).loaded):
        content = dict(zip((item.key for item in loaded.added.items), loaded.added.contents.tolist(), strict=True))
        assert content["by title"] == content["by feature"] != content["by both"]


def test_an_item_without_a_title_teaches_no_word(exports: Path, small: PreparedData, tmp_path: Path) -> None:
    service, file = Service(exports / "plain"), tmp_path / "cold.jsonl"
    service.add_item(NewItem(item="key one"))
    service.add_item(NewItem(item="key two", title="The Brand New One"))
    service.add_item(NewItem(item="key three", title="", features={"title": "The Brand New One"}))
    assert [item["title"] for item in service.find_items("key", 3)] == ["key one", "The Brand New One", "key three"]
    assert export_items(service.store, file) == 3
    titles = {row["item_id"]: row["title"] for row in map(json.loads, file.read_text().splitlines())}
    assert titles == {"key one": None, "key two": "The Brand New One", "key three": "The Brand New One"}
    (title,) = (f.column for f in small.schema.features if f.name == "title")
    learnt = dict(ItemFile(file, "item_id").read(ItemRows(small.path, tmp_path)).new)
    assert learnt["key one"][title] == [] and learnt["key two"][title] == learnt["key three"][title] != []
