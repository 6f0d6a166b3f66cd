"""What is particular to live events in Redis: how it is set up, turns of writers, and files without the forgotten."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from flm_torchrec.errors import RunError
from flm_torchrec.serve import redis_store
from flm_torchrec.serve.event_store import LiveEvent, StoreError, StoreLimits
from flm_torchrec.serve.live_store import open_store
from flm_torchrec.serve.redis_store import TURN
from tests.redis_process import DURABLE, RedisProcess
from tests.serve.test_event_store import add, emptied, items_of


@pytest.fixture
def address(redis_server: str) -> Iterator[str]:
    yield emptied(redis_server)


@pytest.fixture(scope="module")
def careless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    """A Redis with its default settings."""
    with RedisProcess(tmp_path_factory.mktemp("careless"), ()) as running:
        yield running


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({}, "has appendonly no, appendfsync everysec"),
        ({"appendonly": "yes"}, "appendfsync everysec"),
        ({"appendonly": "yes", "appendfsync": "always", "no-appendfsync-on-rewrite": "yes"}, "on-rewrite yes"),
        (
            {"appendonly": "yes", "appendfsync": "always", "maxmemory": "100mb", "maxmemory-policy": "allkeys-lru"},
            "maxmemory-policy allkeys-lru, which may drop events",
        ),
    ],
)
def test_a_server_that_may_lose_what_it_acknowledges_is_refused(
    careless: RedisProcess, settings: dict[str, str], reason: str
) -> None:
    import redis

    default = {"appendonly": "no", "appendfsync": "everysec", "no-appendfsync-on-rewrite": "no"}
    with redis.Redis.from_url(careless.address) as client:
        for name, value in {**default, "maxmemory": "0", "maxmemory-policy": "noeviction", **settings}.items():
            client.config_set(name, value)
        with pytest.raises(RunError, match=reason) as told:
            open_store(careless.address)
        assert "redis.conf" in str(told.value) and "\n" not in str(told.value) and client.dbsize() == 0


def test_a_server_of_no_use_is_one_line_without_its_password(address: str) -> None:
    import redis

    open_store(address).close()
    with redis.Redis.from_url(address) as client:
        client.hset("flm_live:store", "format", 9)
    for wrong, reason in (
        (address, "a store of format 9"),
        (address.replace("//", "//nobody:hidden@"), "invalid username-password|without any password|WRONGPASS"),
        ("redis://nobody:hidden@127.0.0.1:1/0", "127.0.0.1"),
        ("redis://nobody:hidden@127.0.0.1:1/0?nonsense=hidden", "nonsense"),
        ("redis://nobody:hidden@127.0.0.1:none/0", "give a server that is there"),
    ):
        with pytest.raises(RunError, match=reason) as told:
            open_store(wrong)
        assert "hidden" not in str(told.value) and "\n" not in str(told.value)


def test_events_outlive_a_redis_that_is_killed_and_the_store_goes_on(tmp_path: Path) -> None:
    with RedisProcess(tmp_path, DURABLE) as server:
        store = open_store(server.address)
        for number in range(20):
            add(store, "u", f"i{number}")
        server.kill()
        for use in (lambda: add(store, "u", "lost"), lambda: store.events_of("u", 1)):
            with pytest.raises(StoreError, match="cannot be used now"):
                use()
        server.start()
        assert items_of(store, "u") == [f"i{number}" for number in range(20)]
        add(store, "u", "after")
        assert items_of(store, "u", 1) == ["after"]


def test_a_connection_that_broke_is_opened_again_and_nothing_is_there_twice(address: str) -> None:
    import redis

    store, kept = open_store(address), []
    with redis.Redis.from_url(address) as other:
        for number in range(4):
            for client in other.client_list():
                if client["name"] == "flm-serve":
                    other.client_kill_filter(_id=client["id"])
            try:
                add(store, "u", f"i{number}")
                kept.append(f"i{number}")
            except StoreError as error:
                assert "nothing was taken" in str(error)
            assert items_of(store, "u") == kept
    add(store, "u", "last")
    assert items_of(store, "u") == [*kept, "last"]


def test_a_writer_whose_turn_has_run_out_changes_nothing(address: str) -> None:
    import redis

    one, two = open_store(address), open_store(address)
    other = redis.Redis.from_url(address)
    with pytest.raises(StoreError, match="took too long; nothing was taken"), one.writing() as transaction:
        transaction.add_event("u", LiveEvent("late", "view", 1.0, 7, "x"))
        other.delete(TURN)  # as when its time is over
        add(two, "u", "first")
    other.close()
    add(one, "u", "second")
    assert items_of(one, "u") == ["first", "second"] and [n for n, *_ in two.log(0, 9)] == [1, 2]


def test_writers_wait_for_their_turn_but_not_for_ever(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import redis

    store = open_store(address)
    with redis.Redis.from_url(address) as other:
        other.set(TURN, "of one that was killed", px=300)
        add(store, "u", "i1")
        other.set(TURN, "of one that never ends")
        monkeypatch.setattr(redis_store, "PATIENCE", 0.1)
        with pytest.raises(StoreError, match="other processes write"):
            add(store, "u", "i2")
        assert items_of(store, "u") == ["i1"] and other.get(TURN) == b"of one that never ends"


def test_a_database_that_was_emptied_is_a_new_store(address: str) -> None:
    store = open_store(address)
    add(store, "u", "i1")
    before = store.identity()
    emptied(address)
    assert store.log(0, 9) == [] and store.users() == 0 and store.identity() != before
    add(store, "u", "i2")
    assert items_of(store, "u") == ["i2"] and [n for n, *_ in store.log(0, 9)] == [1]


def test_a_reader_sees_a_transaction_as_a_whole(address: str) -> None:
    one, two = open_store(address), open_store(address)
    with one.writing() as transaction:
        for item in ("i1", "i2"):
            transaction.add_event("u", LiveEvent(item, "view", 1.0, 7, "x"))
        assert [event.item for event in transaction.events_of("u", 1)] == ["i2"]
        seen: list[int] = []
        thread = threading.Thread(target=lambda: seen.append(len(two.log(0, 9))))
        thread.start()
        thread.join()
    assert seen == [0] and [item for _, _, item, *_ in two.log(0, 9)] == ["i1", "i2"]


def test_forgotten_users_leave_no_byte_in_the_files(tmp_path: Path) -> None:
    with RedisProcess(tmp_path, (*DURABLE[:-1], "3600 1", "--rdbcompression", "no")) as server:
        store = open_store(server.address, StoreLimits())
        for user in ("secret-user", "stays"):
            add(store, user, f"item-of-{user}", "i2")
        assert store.forget(["secret-user", "nobody"]) == {"secret-user": 2}
        assert items_of(store, "stays") == ["item-of-stays", "i2"] and store.users() == 1
        assert [user for _, user, *_ in store.log(0, 99)] == ["stays"] * 2
        files = [file for file in tmp_path.rglob("*") if file.is_file()]
        kept = b"".join(file.read_bytes() for file in files)
        assert b"secret-user" not in kept and b"item-of-stays" in kept and "dump.rdb" in {file.name for file in files}
