"""Several exports at once: who gets which, what is apart and what is shared, and swaps of one of them."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st

from flm_torchrec.cli import main
from flm_torchrec.errors import RunError
from flm_torchrec.serve.app import ServerLimits, create_app
from flm_torchrec.serve.event_store import EventStore
from flm_torchrec.serve.service import Service
from flm_torchrec.serve.split import Split, apart, draw, read_split
from flm_torchrec.serve.variants import Variants
from tests.serve.serving import AS_ADMIN, KEYS, copy_export

USERS = [f"u{n}" for n in range(120)]
SPLIT = Split((0.7, 0.3), "spring")


@pytest.fixture(scope="module")
def exports(one_tower: None, exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("variants")
    for name in ("one", "two"):
        copy_export(exported, folder / name)
    return folder


@pytest.fixture
def served(exports: Path) -> Variants:
    store = EventStore(None)
    return Variants([Service(exports / name, store) for name in ("one", "two")], SPLIT)


@pytest.fixture
def client(served: Variants) -> Iterator[TestClient]:
    app = create_app(served, ServerLimits(keys=KEYS))
    with TestClient(app, raise_server_exceptions=False, headers=AS_ADMIN) as client:
        yield client


def post(client: TestClient, path: str, **body: Any) -> dict[str, Any]:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def test_a_user_always_gets_the_same_and_the_shares_are_kept() -> None:
    split = Split((0.9, 0.1))
    users = [f"user{n}" for n in range(20_000)]
    first = [split.of(user) for user in users]
    assert first == [split.of(user) for user in users] and 0.09 < sum(first) / len(users) < 0.11
    code = "from flm_torchrec.serve.split import Split; print(*[Split((.9, .1)).of(f'user{n}') for n in range(200)])"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert [int(n) for n in other.stdout.split()] == first[:200]
    wider = [Split((0.8, 0.2)).of(user) for user in users]
    assert all(after >= before for before, after in zip(first, wider, strict=True))  # nobody goes back
    salted = [Split((0.9, 0.1), "again").of(user) for user in users]
    both = sum(a and b for a, b in zip(first, salted, strict=True)) / sum(first)
    assert both < 0.2  # drawn anew: a tenth of the tenth


@given(st.text(), st.text(), st.lists(st.integers(0, 3), max_size=20))
def test_any_text_is_drawn_and_answers_keep_their_places(salt: str, unit: str, groups: list[int]) -> None:
    assert 0 <= draw(salt, unit) < 1 and draw(salt, unit) == draw(salt, unit)
    assert Split((0.5, 0.3, 0.2), salt).of(unit) in (0, 1, 2)
    asked = list(range(len(groups)))
    assert apart(asked, groups, lambda group, some: [(group, one) for one in some]) == list(
        zip(groups, asked, strict=True)
    )


@pytest.mark.parametrize(
    ("text", "exports", "reason"),
    [
        ("90/10", 1, "has 2 shares, and --export names 1"),
        ("90/10", 3, "give one for each"),
        ("90", 2, "has 1 shares"),
        ("90/20", 2, "add up to 100"),
        ("100/0", 2, "above 0"),
        ("110/-10", 2, "above 0"),
        ("nan/10", 2, "above 0"),
        ("a/b", 2, "write percents with slashes"),
        ("", 2, "write percents with slashes"),
    ],
)
def test_wrong_shares_are_told(text: str, exports: int, reason: str) -> None:
    with pytest.raises(RunError, match="--split") as told:
        read_split(text, exports)
    assert reason in str(told.value)


def test_shares_are_percents() -> None:
    assert read_split("90/10", 2).shares == (0.9, 0.1)
    assert read_split("33.4/33.3/33.3", 3).shares == pytest.approx((0.334, 0.333, 0.333))
    assert read_split(None, 4).shares == (0.25,) * 4


def test_wrong_options_are_one_line(exports: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "one").symlink_to(exports / "two")
    both = [str(exports / "one"), str(exports / "two")]
    for options, reason in (
        ([*both, "--split", "90/20"], "--split 90/20: "),
        ([both[0], "--split", "90/10"], "--export names 1"),
        ([both[0], str(tmp_path / "one")], "two are named 'one'"),
        ([both[0], str(tmp_path / "none")], "none/manifest.json: not found"),
        ([*both, "--least-recall", "2"], "--least-recall 2.0: give 0 … 1"),
    ):
        assert main(["serve", "--port", "18474", "--export", *options]) == 2
        told = capsys.readouterr().err
        assert reason in told and told.count("\n") == 1, told


def test_each_user_is_answered_by_one_export(client: TestClient, served: Variants) -> None:
    wanted = {user: ("one", "two")[SPLIT.of(user)] for user in USERS}
    assert set(wanted.values()) == {"one", "two"}
    batch = post(client, "/v1/recommend/batch", requests=[{"user": user, "k": 3} for user in USERS[:64]])["answers"]
    assert [(a["export"], a["model_version"]) for a in batch] == [(wanted[user],) * 2 for user in USERS[:64]]
    for answer, user in list(zip(batch, USERS, strict=False))[:6]:
        alone = post(client, "/v1/recommend", user=user, k=3)
        assert alone["export"] == wanted[user] and [i["item"] for i in alone["items"]] == [
            i["item"] for i in answer["items"]
        ]
    cold = {user: post(client, "/v1/recommend", split_by=user, k=1)["export"] for user in USERS[:20]}
    assert cold == {user: wanted[user] for user in USERS[:20]}
    assert post(client, "/v1/recommend", k=1)["export"] == "one"
    similar = {user: post(client, "/v1/similar", item="i1", k=1, split_by=user)["export"] for user in USERS[:20]}
    assert similar == cold


def test_events_and_items_are_shared_and_counts_are_apart(client: TestClient, served: Variants) -> None:
    users = {name: next(u for u in USERS if served.of(u).name == name) for name in ("one", "two")}
    post(client, "/v1/items", item="new", features={"genre": "war"})
    for name, user in users.items():
        assert post(client, "/v1/events", user=user, item="new")["export"] == name
        assert client.get("/v1/events", params={"user": user}).json()[-1]["item"] == "new"
        assert "new" not in [i["item"] for i in post(client, "/v1/recommend", user=user, k=1000)["items"]]
    client.post("/v1/recommend", json={"user": users["two"], "filter": {"genre": ["none"]}})
    told = client.get("/metrics").text
    for labels, count in (
        ('export="one",route="/v1/events",status="200"', 1),
        ('export="two",route="/v1/recommend",status="200"', 1),
        ('export="two",route="/v1/recommend",status="422"', 1),
    ):
        assert f"flm_export_requests_total{{{labels}}} {count}.0" in told
    assert 'flm_export_request_seconds_count{export="two"} 3.0' in told
    assert re.search(r'flm_export_generation\{export="two"\} 1\.0', told)


def test_one_of_them_is_swapped_and_back(client: TestClient, exports: Path, served: Variants) -> None:
    user = next(u for u in USERS if served.of(u).name == "two")
    for body, reason in (({}, "name one of one, two"), ({"replaces": "tow"}, "did you mean 'two'")):
        refused = client.post("/v1/swap", json={"export": str(exports / "one"), **body})
        assert refused.status_code == 422 and reason in refused.json()["detail"]
    for target in ("one", "two"):
        told = post(client, "/v1/swap", export=str(exports / target), replaces="two")
        assert [(e["export"], e["model_version"]) for e in told["exports"]] == [("one", "one"), ("two", target)]
        answer = post(client, "/v1/recommend", user=user, k=1)
        assert (answer["export"], answer["model_version"]) == ("two", target)
    health = client.get("/health").json()
    assert [(e["generation"], e["share"]) for e in health["exports"]] == [(1, 0.7), (3, 0.3)]
    assert str(exports) not in str(health)
