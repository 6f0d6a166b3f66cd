"""A fresh export is checked against brute force, tried on a share of the users, and taken back where it fails."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from fastapi.testclient import TestClient

from flm_torchrec.export.index import INDEX
from flm_torchrec.export.manifest import FILE, read_manifest
from flm_torchrec.export.tower.reader import TowerQuery
from flm_torchrec.files import sha256
from flm_torchrec.serve.app import ServerLimits, create_app
from flm_torchrec.serve.event_store import EventStore
from flm_torchrec.serve.loaded_export import LoadedExport, load_export
from flm_torchrec.serve.messages import NewEvent, NewItem, Recommend
from flm_torchrec.serve.recall import measured_recall, sample_recall
from flm_torchrec.serve.resolve import Refused
from flm_torchrec.serve.service import Service, ServiceOptions
from flm_torchrec.serve.swapping import Canary, CanaryTerms
from tests.serve.serving import AS_ADMIN, KEYS, copy_export

USERS = [f"u{n}" for n in range(40)]


@pytest.fixture(scope="module")
def exports(one_tower: None, exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`one` and `two` are sound; the index of `blind` has other vectors than its rows."""
    folder = tmp_path_factory.mktemp("canaries")
    for name in ("one", "two", "blind"):
        copy_export(exported, folder / name)
    blind(folder / "blind")
    return folder


def blind(export: Path) -> None:
    """Replace the index by one that fits the manifest and finds the wrong items."""
    index = faiss.read_index(str(export / INDEX))
    wrong = faiss.IndexFlatIP(index.d)
    wrong.add(np.ascontiguousarray(-index.reconstruct_n(0, index.ntotal)))
    before = read_manifest(export).sha256[INDEX]
    faiss.write_index(wrong, str(export / INDEX))
    (export / FILE).write_text((export / FILE).read_text().replace(before, sha256(export / INDEX)))


@pytest.fixture
def told() -> list[dict[str, Any]]:
    return []


@pytest.fixture
def service(exports: Path, told: list[dict[str, Any]]) -> Service:
    options = ServiceOptions(announce=lambda name, state: told.append(state))
    return Service(exports / "one", EventStore(None), options=options)


def terms(share: float = 0.5, seconds: float = 600) -> CanaryTerms:
    return CanaryTerms(share, time.time() + seconds)


def versions(service: Service) -> dict[str, str]:
    """By user: the model that answers."""
    answers = service.recommend([Recommend(user=user, k=2) for user in USERS])
    assert all(isinstance(answer, dict) for answer in answers)
    return {user: answer["model_version"] for user, answer in zip(USERS, answers, strict=True)}  # type: ignore


def test_recall_is_that_of_what_is_served(exports: Path) -> None:
    sound, wrong = (load_export(exports / name, 1) for name in ("one", "blind"))
    assert sample_recall(sound) == 1.0 and sample_recall(wrong) < 0.9
    users = sound.represent([TowerQuery(), TowerQuery(sound.tower.known_history(3), 3)])
    assert measured_recall(sound, users) == 1.0
    k, everything = 100, sound.vectors(np.arange(sound.size))
    shares = []
    for head in range(len(sound.manifest.heads)):
        scores = [everything @ user.heads[head] for user in users]
        lasts = [set(np.argsort(one)[:k].tolist()) for one in scores]  # the best by the negated vectors
        firsts = [set(np.argsort(-one)[:k].tolist()) for one in scores]
        shares.append(np.mean([len(last & first) / k for last, first in zip(lasts, firsts, strict=True)]))
    assert measured_recall(wrong, users, [everything]) == pytest.approx(min(shares))


def test_an_index_that_finds_too_little_is_refused(exports: Path, service: Service, told: list[Any]) -> None:
    for canary in (None, terms()):
        with pytest.raises(Refused, match=r"finds 0\.\d+ of the 100 best items, below 0\.9.*--least-recall") as refused:
            service.swap(exports / "blind", canary)
        assert refused.value.status == 422 and service.loaded.folder == exports / "one" and service.canary is None
    assert told == []
    trusting = Service(exports / "one", options=ServiceOptions(least_recall=0.0))
    trusting.swap(exports / "blind")
    assert trusting.loaded.folder == exports / "blind"


def test_a_share_gets_the_canary_and_then_all_do(exports: Path, service: Service, told: list[Any]) -> None:
    service.swap(exports / "two", terms(0.4))
    found = versions(service)
    share = [user for user in USERS if found[user] == "two"]
    assert 0.2 < len(share) / len(USERS) < 0.65 and versions(service) == found
    assert service.recommend([Recommend(k=1)])[0]["model_version"] == "one"  # type: ignore[index]
    assert {service.label(user) for user in share} == {"one+canary"} and service.label(None) == "one"
    service.swaps.tend()
    assert versions(service) == found
    assert service.canary is not None
    service.canary.terms = terms(0.4, -1)
    service.swaps.tend()
    assert set(versions(service).values()) == {"two"} and service.canary is None and service.swaps.recall == 1.0
    assert [state["canary"] and state["canary"]["share"] for state in told] == [0.4, None]


def test_cold_items_and_events_reach_the_canary(exports: Path, service: Service) -> None:
    service.swap(exports / "two", terms(0.5))
    service.add_item(NewItem(item="new", features={"genre": "war"}))
    assert service.canary is not None
    user = next(user for user in USERS if service.canary.takes(user))
    answers = service.add_events([NewEvent(user=user, item="new")])
    assert isinstance(answers[0], dict) and answers[0]["model_version"] == "two"
    (answer,) = service.recommend([Recommend(user=user, k=1000)])
    (other,) = service.recommend([Recommend(user=user, k=1000, exclude_seen=False)])
    assert isinstance(answer, dict) and isinstance(other, dict)
    assert "new" not in [i["item"] for i in answer["items"]] and "new" in [i["item"] for i in other["items"]]
    assert service.events_of(user)[-1]["item"] == "new"


def test_a_canary_that_fails_is_taken_back_and_nobody_sees_it(
    exports: Path, service: Service, told: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    service.swap(exports / "two", terms())
    assert service.canary is not None
    broken = copy.copy(service.canary.fresh.tower)
    broken.user = _broken  # type: ignore[assignment]
    service.canary.fresh = replace(service.canary.fresh, tower=broken)
    assert set(versions(service).values()) == {"one"} and service.canary is None
    assert "rolled back: it could not answer (RuntimeError: no kernel)" in capsys.readouterr().out
    assert told[-1] == {"export": str(exports / "one"), "canary": None}


def _broken(*_: Any) -> None:
    raise RuntimeError("no kernel")


def test_a_request_that_both_fail_at_is_not_the_canarys_fault(
    exports: Path, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.swap(exports / "two", terms(0.99))
    monkeypatch.setattr("flm_torchrec.serve.service.asked_user", _broken)
    with pytest.raises(RuntimeError, match="no kernel"):
        service.recommend([Recommend(user=USERS[3])])
    assert service.canary is not None


def test_a_canary_whose_recall_falls_is_taken_back(
    exports: Path, service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    service.swap(exports / "two", terms())
    canary = service.canary
    assert canary is not None
    versions(service)
    backwards = copy.copy(canary.fresh.catalogue.index)
    assert backwards is not None
    flipped = faiss.IndexFlatIP(canary.fresh.manifest.dim)
    flipped.add(-canary.fresh.catalogue.distinct)
    catalogue = replace(canary.fresh.catalogue, index=replace(backwards, index=flipped))
    canary.fresh = replace(canary.fresh, catalogue=catalogue)
    service.swaps.tend()
    assert service.canary is canary  # measured every half minute
    canary.check_at = 0.0
    service.swaps.tend()
    assert service.canary is None and service.loaded.folder == exports / "one"
    assert "rolled back: recall@100 has fallen to 0." in capsys.readouterr().out


def test_an_admin_ends_a_canary_either_way(exports: Path, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    service.swap(exports / "two", terms())
    assert service.canary is not None
    fresh = service.canary.fresh
    monkeypatch.setattr("flm_torchrec.serve.service.load_export", _broken)
    service.swap(exports / "two")
    assert service.loaded.catalogue is fresh.catalogue and service.canary is None  # not loaded again
    monkeypatch.undo()
    service.swap(exports / "one", terms())
    service.swap(exports / "two")
    assert service.canary is None and service.loaded.manifest.model_version == "two"


def test_other_processes_do_the_same(exports: Path, told: list[Any]) -> None:
    others = [Service(exports / "one", options=ServiceOptions(announce=lambda *_: told.append("no"))) for _ in range(1)]

    def tell(name: str, state: dict[str, Any]) -> None:
        for other in others:
            other.swaps.follow(state)

    leader = Service(exports / "one", options=ServiceOptions(announce=tell))
    steps: list[Callable[[], Any]] = [
        lambda: leader.swap(exports / "two", terms(0.3)),
        lambda: leader.swaps.roll_back(leader.canary or Canary(leader.loaded, terms()), "a test"),
        lambda: leader.swap(exports / "two", terms(0.6)),
        lambda: leader.swap(exports / "two"),
        lambda: leader.swap(exports / "one"),
    ]
    for step in steps:
        step()
        assert all(versions(other) == versions(leader) for other in others)
        assert all(other.swaps.state() == leader.swaps.state() for other in others)
    leader.swap(exports / "two", terms(0.6))
    later = Service(exports / "one", swapped=leader.loaded.folder)
    later.swaps.follow(leader.swaps.state())
    assert later.swaps.state() == leader.swaps.state()
    assert told == []  # who follows does not tell again


def test_a_state_that_is_served_already_loads_nothing(
    exports: Path, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flm_torchrec.serve.service.load_export", _broken)
    before: LoadedExport = service.loaded
    service.swaps.follow(service.swaps.state())
    assert service.loaded is before


def test_a_canary_over_http(exports: Path) -> None:
    service = Service(exports / "one")
    with TestClient(create_app(service, ServerLimits(keys=KEYS)), headers=AS_ADMIN) as client:
        body = {"export": str(exports / "two"), "canary": 0.5, "minutes": 5}
        (told,) = client.post("/v1/swap", json=body).json()["exports"]
        assert (told["model_version"], told["canary"]["model_version"], told["canary"]["share"]) == ("one", "two", 0.5)
        assert told["recall"] == 1.0 and 290 < told["canary"]["until"] - time.time() <= 300
        for user in USERS[:12]:
            client.post("/v1/recommend", json={"user": user, "k": 1})
        counts = client.get("/metrics").text
        of = [f'flm_export_requests_total{{export="{e}",route="/v1/recommend"' for e in ("one", "one+canary")]
        assert all(start in counts for start in of) and 'flm_export_canary{export="one"} 0.5' in counts
        for wrong in ({"canary": 0}, {"canary": 1}, {"canary": 0.5, "minutes": 0}):
            refused = client.post("/v1/swap", json={"export": str(exports / "two"), **wrong})
            assert refused.status_code == 422 and "Input should be" in refused.json()["detail"]
