"""Live events and cold items outlive their server, are shared by processes, and become a log for the next training."""

from __future__ import annotations

import os
import secrets
import shutil
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from fastapi.testclient import TestClient

from flm_torchrec.cli import main
from flm_torchrec.data.dataset import PreparedData, load_prepared
from flm_torchrec.errors import RunError
from flm_torchrec.serve import event_store
from flm_torchrec.serve.app import create_app
from flm_torchrec.serve.event_log import WrittenEvents, export_events
from flm_torchrec.serve.event_store import EventStore, LiveEvent, StoreError, StoreLimits
from flm_torchrec.serve.live_store import LiveStore, open_store
from flm_torchrec.serve.messages import NewEvent, NewItem
from flm_torchrec.serve.resolve import Refused
from flm_torchrec.serve.service import Service
from flm_torchrec.training.follow.sources import open_source
from tests.serve.serving import post

pytestmark = pytest.mark.usefixtures("one_tower")
READER = """
import sys
from pathlib import Path
from flm_torchrec.serve.event_store import EventStore
store = EventStore(Path(sys.argv[1]))
print(*(event.item for event in store.events_of("u", 9)))
store.close()
"""
WRITER = """
import sys
from flm_torchrec.serve.event_store import LiveEvent
from flm_torchrec.serve.live_store import open_store
store = open_store(sys.argv[1])
for n in range(10**9):
    with store.writing() as transaction:
        transaction.add_event(f"u{n % 3}", LiveEvent(f"i{n}", "view", 1.0, n, "x"))
        transaction.add_event("both", LiveEvent(f"i{n}", "view", 1.0, n, "x"))
    print(n, flush=True)
"""


@pytest.fixture(params=["sqlite", "postgresql", "redis"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of a store that nobody has used."""
    if request.param == "sqlite":
        return str(tmp_path / "s")
    if request.param == "redis":
        return emptied(request.getfixturevalue("redis_server"))
    psycopg = pytest.importorskip("psycopg", reason="install flm_torchrec[postgresql]")
    server, name = request.getfixturevalue("postgresql"), f"live_{secrets.token_hex(4)}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"CREATE SCHEMA {name}")
    return f"{server}{'&' if '?' in server else '?'}options=-csearch_path%3D{name}"


def emptied(address: str) -> str:
    import redis

    with redis.Redis.from_url(address) as client:
        client.flushdb()
    return address


def add(store: LiveStore, user: str, *items: str) -> None:
    with store.writing() as transaction:
        for item in items:
            transaction.add_event(user, LiveEvent(item, "view", 1.0, 7, "x"))


def items_of(store: LiveStore, user: str, most: int = 100) -> list[str]:
    return [event.item for event in store.events_of(user, most)]


@pytest.mark.parametrize("acknowledged", [1, 40])
def test_nothing_acknowledged_is_lost_by_a_kill(address: str, acknowledged: int) -> None:
    process = subprocess.Popen([sys.executable, "-c", WRITER, address], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    told = [int(process.stdout.readline()) for _ in range(acknowledged)]
    process.kill()
    told += [int(line) for line in process.stdout.read().split()]
    process.wait()
    store = open_store(address)
    kept = [item for _, user, item, *_ in store.log(0, 10**9) if user == "both"]
    assert kept[: len(told)] == [f"i{n}" for n in told]
    assert len(store.log(0, 10**9)) == 2 * len(kept)  # both events of a transaction or none
    assert items_of(store, "u1") == [f"i{n}" for n in range(len(kept)) if n % 3 == 1][-100:]
    add(store, "u1", "after")
    assert items_of(store, "u1", 1) == ["after"]


def test_a_process_that_ends_leaves_the_log_of_the_others(tmp_path: Path) -> None:
    store = EventStore(tmp_path / "s")
    for item in ("a", "b", "c"):
        with store.writing() as transaction:
            transaction.add_event("u", LiveEvent(item, "view", 1.0, 1, "e"))
        seen = subprocess.run(
            [sys.executable, "-c", READER, tmp_path / "s"], capture_output=True, text=True, check=True
        ).stdout
        assert seen.split()[-1] == item
    assert seen.split() == ["a", "b", "c"] == [event.item for event in store.events_of("u", 9)]


def test_a_transaction_with_an_error_leaves_nothing(address: str) -> None:
    store = open_store(address)
    with pytest.raises(ZeroDivisionError), store.writing() as transaction:
        transaction.add_event("u", LiveEvent("i", "view", 1.0, 7, "x"))
        raise ZeroDivisionError
    add(store, "v", "i")
    assert items_of(store, "u") == [] and store.users() == 1


def test_writers_of_several_connections_keep_each_order(address: str) -> None:
    stores = [open_store(address) for _ in range(3)]
    wanted = [f"i{n}" for n in range(30)]

    def write(number: int) -> None:
        for item in wanted:
            add(stores[number], f"u{number}", item)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(items_of(stores[0], f"u{n}") == wanted for n in range(3))
    assert stores[1].users() == 3 and len({store.identity() for store in stores}) == 1


@pytest.mark.parametrize("in_memory", [True, False])
def test_the_oldest_events_and_the_silent_users_are_dropped(address: str, in_memory: bool) -> None:
    store = open_store(None if in_memory else address, StoreLimits(live_users=2, events=4))
    for user, *items in (("a", "1", "2"), ("b", "3", "4", "5"), ("c", "6")):
        add(store, user, *items)
    assert [items_of(store, user) for user in "abc"] == [[], ["3", "4", "5"], ["6"]]
    add(store, "c", "7", "8", "9")
    assert [items_of(store, user) for user in "bc"] == [[], ["6", "7", "8", "9"]]
    assert items_of(store, "c", 2) == ["8", "9"] and store.users() == 1


def test_events_are_dropped_when_their_days_are_over(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(address, StoreLimits(days=2))
    now = 1_700_000_000.0
    for hours, item in ((0, "1"), (30, "2"), (49, "3")):
        monkeypatch.setattr("flm_torchrec.serve.event_store.time.time", lambda at=now + hours * 3600: at)
        add(store, "u" if item != "1" else "first", item)
    assert items_of(store, "u") == ["2", "3"] and items_of(store, "first") == [] and store.users() == 1


def test_processes_that_start_at_once_open_one_new_store(tmp_path: Path) -> None:
    for number in range(20):
        together, failed = threading.Barrier(6), list[RunError]()

        def begin(file: Path, together: threading.Barrier = together, failed: list[RunError] = failed) -> None:
            together.wait()
            try:
                EventStore(file).close()
            except RunError as error:
                failed.append(error)

        threads = [threading.Thread(target=begin, args=(tmp_path / f"store{number}",)) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed


def test_a_store_that_another_process_begins_is_waited_for(tmp_path: Path) -> None:
    other = sqlite3.connect(tmp_path / "store", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    ended = threading.Timer(0.2, other.execute, ["ROLLBACK"])
    ended.start()
    EventStore(tmp_path / "store").close()
    ended.join()
    other.close()


def test_a_store_that_stays_locked_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_store, "PATIENCE", 0.1)
    other = sqlite3.connect(tmp_path / "store", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(RunError, match="store: database is locked; give --events another file"):
        EventStore(tmp_path / "store")
    other.close()


def test_what_is_no_store_is_refused_and_stays(tmp_path: Path) -> None:
    other, text, newer = (tmp_path / name for name in ("other", "text", "newer"))
    sqlite3.connect(other).executescript("CREATE TABLE t (x); INSERT INTO t VALUES (1);")
    text.write_text("not a database, but long enough to be taken for one at first sight" * 20)
    EventStore(newer).close()
    changed = sqlite3.connect(newer)
    changed.execute("PRAGMA user_version = 9")
    changed.close()
    before = text.read_bytes()
    for file, reason in ((other, "another program"), (text, "not a database"), (newer, "format 9"), (tmp_path, "dir")):
        with pytest.raises(RunError, match=reason):
            EventStore(file)
    assert text.read_bytes() == before
    assert sqlite3.connect(other).execute("SELECT x FROM t").fetchall() == [(1,)]


def test_events_of_forgotten_users_are_gone_and_the_count_is_right(address: str) -> None:
    store = open_store(address)
    for user in ("a", "b", "a", "c"):
        add(store, user, "i1", "i2")
    assert store.forget(["a", "nobody", "a"]) == {"a": 4} and store.users() == 2
    add(store, "a", "i3")
    assert items_of(store, "a") == ["i3"] and items_of(store, "b") == ["i1", "i2"] and store.users() == 3


def test_keys_of_any_characters_are_kept(address: str) -> None:
    store = open_store(address)
    for user in ("it's", 'a "b"', "%s", "c\\", "d\ne", "); DROP TABLE items; --", "日本", "\U0001f600"):
        add(store, user, user)
        assert items_of(store, user) == [user]
    assert items_of(store, "a\0b") == []


@pytest.fixture
def database(address: str) -> str:
    return address if address.startswith("postgresql") else pytest.skip("of PostgreSQL")


def test_a_connection_that_broke_is_opened_again(database: str) -> None:
    import psycopg

    store, kept = open_store(database), ["i0"]
    add(store, "u", "i0")
    for item in ("i1", "i2"):
        with psycopg.connect(database, autocommit=True) as other:
            mine = "application_name = 'flm serve' AND pid <> pg_backend_pid()"
            other.execute(f"SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE {mine}")
        for use in (lambda: add(store, "u", "lost"), lambda: store.events_of("u", 1)):
            with pytest.raises(StoreError, match="cannot be used now"):
                use()
        add(store, "u", item)
        kept.append(item)
        assert items_of(store, "u") == kept


def test_events_become_visible_in_the_order_of_their_numbers(database: str) -> None:
    one, two = open_store(database), open_store(database)
    done = threading.Event()

    def write() -> None:
        add(two, "late", "i2")
        done.set()

    with one.writing() as transaction:
        transaction.add_event("early", LiveEvent("i1", "view", 1.0, 7, "x"))
        thread = threading.Thread(target=write)
        thread.start()
        assert not done.wait(0.2) and two.log(0, 9) == []  # else a reader would miss the smaller number
    thread.join()
    assert [user for _, user, *_ in two.log(0, 9)] == ["early", "late"]


def test_a_database_of_no_use_is_one_line_without_its_password(database: str) -> None:
    import psycopg

    open_store(database).close()
    with psycopg.connect(database, autocommit=True) as other:
        other.execute("UPDATE flm_live_store SET format = 9")
    for address, reason in (
        (database, "a store of format 9"),
        ("postgresql://nobody:hidden@127.0.0.1:1/none", "127.0.0.1"),
        ("postgresql://nobody:hidden@127.0.0.1:1/none?nonsense=1", "nonsense"),
        ("mysql://nobody:hidden@127.0.0.1", "no such kind of store; give a file"),
        ("memory:", "no such kind of store; give a file"),
    ):
        with pytest.raises(RunError, match=reason) as told:
            open_store(address)
        assert "hidden" not in str(told.value) and "\n" not in str(told.value)


def test_a_hostile_key_spoils_no_other_event(exported: Path, address: str) -> None:
    service = Service(exported, open_store(address))
    with TestClient(create_app(service), raise_server_exceptions=False) as client:
        for body in ({"user": "a\0b", "item": "i1"}, {"user": "a", "item": "i\0"}):
            assert client.post("/v1/events", json=body).status_code == 422
        assert client.post("/v1/items", json={"item": "i\0"}).status_code == 422
        assert client.post("/v1/items", json={"item": "n", "title": "\0"}).status_code == 422
        for path in ("/v1/events?user=a%00b", "/v1/users?query=%00"):
            assert client.get(path).status_code in (200, 404)
        assert client.post("/v1/recommend", json={"user": "a\0b"}).status_code == 404
        assert client.post("/v1/events", json={"user": "a", "item": "i1"}).status_code == 200


def test_only_the_owner_can_read_what_users_did(tmp_path: Path) -> None:
    store = EventStore(tmp_path / "s")
    add(store, "u", "i")
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o600}


def ask(service: Service, **request: Any) -> dict[str, Any]:
    with TestClient(create_app(service)) as client:
        response = client.post("/v1/recommend", json=request)
        assert response.status_code == 200, response.text
        return response.json()


def test_a_restart_answers_as_before(exported: Path, address: str) -> None:
    first = Service(exported, open_store(address))
    first.add_item(NewItem(item="new", features={"genre": "war"}))
    told = first.add_events([NewEvent(user="u4", item="new"), NewEvent(user="fresh", item="i3", value=2.0)])
    assert [answer["live_events"] for answer in told if isinstance(answer, dict)] == [1, 1]
    before = [first.recommend([request])[0] for request in _requests()]
    first.store.close()
    second = Service(exported, open_store(address))
    assert [second.recommend([request])[0] for request in _requests()] == before
    assert second.events_of("u4")[-1]["item"] == "new" and second.find_items("new", 5)[0]["item"] == "new"


def _requests() -> list[Any]:
    from flm_torchrec.serve.messages import Recommend

    return [Recommend(user="u4", k=1000), Recommend(user="fresh", k=20), Recommend(filter={"genre": ["war"]}, k=1000)]


def test_a_server_beside_knows_at_once(exported: Path, address: str) -> None:
    one, two = (Service(exported, open_store(address)) for _ in range(2))
    before = one.loaded.size
    one.add_item(NewItem(item="a"))
    two.add_item(NewItem(item="b"))
    one.add_item(NewItem(item="a", title="again"))
    two.add_events([NewEvent(user="fresh", item="a"), NewEvent(user="fresh", item="b")])
    assert [event["item"] for event in one.events_of("fresh")] == ["a", "b"]
    assert one.loaded.size == two.loaded.size == before + 2 and two.find_items("again", 5)[0]["item"] == "a"
    refused = one.add_events([NewEvent(user="fresh", item="a", timestamp=1), NewEvent(user="fresh", item="i1")])
    assert isinstance(refused[0], Refused) and refused[0].status == 422 and isinstance(refused[1], dict)


def test_an_event_that_cannot_be_kept_is_not_acknowledged(exported: Path, tmp_path: Path) -> None:
    store = EventStore(tmp_path / "s")
    service = Service(exported, store)
    with TestClient(create_app(service)) as client:
        store.writer.execute("PRAGMA query_only = ON")  # as on a full disk
        response = client.post("/v1/events", json={"user": "u1", "item": "i1"})
        assert (response.status_code, response.headers["Retry-After"]) == (503, "1")
        assert "nothing was taken" in response.json()["detail"]
        store.writer.execute("PRAGMA query_only = OFF")
        assert client.post("/v1/events", json={"user": "u1", "item": "i1"}).json()["live_events"] == 1
    with pytest.raises(StoreError):
        service.store.users()


def test_the_log_is_exported_once_and_read_by_follow_and_prepare(
    exported: Path, tmp_path: Path, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    service = Service(exported, open_store(address))
    service.add_item(NewItem(item="cold", features={"genre": "war", "price": 3.5}))
    posted = [NewEvent(user=f"u{n % 2}", item=item) for n, item in enumerate(("i1", "i2", "cold", "i4"))]
    service.add_events(posted[:3])
    command = ["export-events", "--events", address, "--output", str(tmp_path / "log")]
    assert main(command) == 0 and main(command) == 0
    assert capsys.readouterr().out.splitlines() == [f"{tmp_path / 'log'}: {n} new events" for n in (3, 0)]
    service.add_events(posted[3:])
    assert main([*command, "--items", str(tmp_path / "items.jsonl")]) == 0
    written = pq.read_table(tmp_path / "log").to_pylist()
    assert [(row["user"], row["item"], row["event"]) for row in written] == [(e.user, e.item, "view") for e in posted]
    source = open_source(str(tmp_path / "log"))
    chunk = source.after({})
    assert chunk is not None and [row["item"] for _, row in chunk.rows] == ["i1", "i2", "cold"]
    columns = "user=user,item=item,timestamp=timestamp,event=event,value=value"
    prepare = ["prepare", "--source", "parquet", "--input", str(tmp_path / "log"), "--columns", columns]
    features = ["--items", str(tmp_path / "items.jsonl"), "--item-features", "genre:categorical,price:numeric"]
    assert main([*prepare, *features, "--output", str(tmp_path / "data"), "--min-count", "1"]) == 0
    assert load_prepared(tmp_path / "data").schema.interactions == 4


def test_events_dropped_before_they_were_exported_are_counted(tmp_path: Path) -> None:
    store = EventStore(tmp_path / "s", StoreLimits(events=2))
    add(store, "u", "1", "2")
    assert export_events(store, tmp_path / "log") == WrittenEvents(2, 0)
    add(store, "u", "3", "4", "5")
    assert export_events(store, tmp_path / "log") == WrittenEvents(2, 1)
    assert export_events(EventStore(tmp_path / "t"), tmp_path / "log") == WrittenEvents()


def test_events_forgotten_before_they_were_exported_are_not_told_as_dropped_alone(
    tmp_path: Path, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    store = open_store(address)
    add(store, "gone", "1", "2")
    store.forget(["gone"])
    add(store, "u", "3")
    assert main(["export-events", "--events", address, "--output", str(tmp_path / "log")]) == 0
    told = "1 new events; 2 before them are not there any more (dropped by the limits of 'flm serve', or forgotten)\n"
    assert capsys.readouterr().out.endswith(told)


def test_a_store_that_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["export-events", "--events", str(tmp_path / "none"), "--output", str(tmp_path / "log")]
    assert main(command) == 2 and "flm serve --events" in capsys.readouterr().err
    assert not os.listdir(tmp_path)


def test_forgotten_users_leave_no_byte_and_the_others_stay(
    small: PreparedData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(small.path, tmp_path / "data")
    store = EventStore(tmp_path / "s")
    for user in ("u1", "onlyhere", "stays"):
        add(store, user, "secretitem-" + user, "i2")
    command = ["forget", "--data", str(tmp_path / "data"), "--events", str(tmp_path / "s"), "--user"]
    assert main([*command, "onlyhere"]) == 0 and main([*command, "u1"]) == 0
    told = capsys.readouterr().out
    assert told.count("1 users and their 2 live events forgotten") == 2 and "data: 1 users" in told
    assert items_of(store, "stays") == ["secretitem-stays", "i2"] and store.users() == 1
    kept = b"".join(file.read_bytes() for file in tmp_path.glob("s*"))
    assert b"secretitem-u1" not in kept and b"onlyhere" not in kept and b"secretitem-stays" in kept
    assert main([*command, "onlyhere"]) == 2 and "user 'onlyhere'" in capsys.readouterr().err
    assert main([*command[:4], str(tmp_path / "none"), "--user", "u2"]) == 2


def test_an_export_without_features_of_events_goes_on_with_the_store(exported: Path, tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "s"))
    with store.writing() as transaction:
        transaction.add_event("new", LiveEvent("i3", "view", 1.0, 7, "x", {"device": "tv"}))
    with TestClient(create_app(Service(exported, store))) as client:
        assert len(post(client, "/v1/recommend", user="new")["items"]) == 10
        assert "context" not in client.get("/v1/events", params={"user": "new"}).json()[0]
        refused = client.post("/v1/events", json={"user": "new", "item": "i1", "context": {"device": "tv"}})
        assert refused.status_code == 422 and "no event feature 'device'; events have no features" in refused.text
