"""Live events and cold items in a Redis server, which servers on several machines share.

It keeps what `EventStore` keeps, in the same order and within the same limits. An event is acknowledged once Redis has
answered, and Redis must be set up so that it is on the disk by then (`redis_persistence`). Writers take turns by a key
that runs out, so that one that was killed keeps nobody waiting. All changes of a transaction go into one MULTI, which
Redis refuses where the turn has run out meanwhile.

Keys, all behind `flm_live:`:

* `store`, hash: `id`, `format`; `seq` and `items`, numbers of the last event and of the last change of an item;
  `first`: all events have this number or a later one.
* `events`, hash: number → JSON of user, item, event, value, timestamp, export, received, and, where an
  event has one, its context.
* `of:USER`, list: numbers of the user's events. `users`, sorted set: user by the number of the newest event.
* `items`, hash: item → JSON of number, title, features. `changes`, sorted set: item by number.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from flm_torchrec.errors import RunError
from flm_torchrec.safe_text import first_line, redact_address
from flm_torchrec.serve.event_store import DAY, PATIENCE, StoredItem, StoreError, StoreLimits
from flm_torchrec.serve.live_event import LiveEvent, LoggedEvent
from flm_torchrec.serve.redis_persistence import check_settings, rewrite_files
from flm_torchrec.serve.redis_scripts import DROP, EVENTS_OF, FORGET, RELEASE

FORMAT = "1"
STORE, EVENTS, USERS, ITEMS, CHANGES, TURN = (
    f"flm_live:{name}" for name in ("store", "events", "users", "items", "changes", "turn")
)
OF = "flm_live:of:"
TURN_SECONDS = 3.0
"""In which a writer must be done. If it was killed, the next one may write after so long."""
LOOK = 0.002
"""Seconds between two tries to take the turn."""
AT_ONCE = 10_000
"""Maximum of old events that one transaction drops: Redis does nothing else meanwhile."""


class RedisStore:
    """As `EventStore`. The client opens connections as threads need them, also after one broke.

    Args:
        address: redis://HOST:PORT/NUMBER, rediss:// for TLS.

    Raises:
        RunError: the client is not installed, the server cannot be used, or does not keep what it acknowledges.
    """

    def __init__(self, address: str, limits: StoreLimits) -> None:
        self.address = address
        self.limits = limits
        try:
            import redis
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        except ModuleNotFoundError as error:
            raise RunError("--events redis: needs its client; pip install 'flm_torchrec[redis]'") from error
        self.errors = redis
        self.writes = threading.RLock()
        self.closed = False
        try:
            self.client: Any = redis.Redis.from_url(
                address,
                decode_responses=True,
                socket_timeout=PATIENCE,
                socket_connect_timeout=PATIENCE,
                retry=Retry(NoBackoff(), 0),  # a change that was sent twice could be kept twice
                client_name="flm-serve",
            )
            self.snapshots = check_settings(self.client, f"--events {redact_address(address)}")
            found = self._state()["format"]
        except (redis.RedisError, ValueError, TypeError) as error:  # the others are wrong parts of the address
            reason = first_line(error, address)
            raise RunError(f"--events {redact_address(address)}: {reason}; give a server that is there") from error
        if found != FORMAT:
            where = f"--events {redact_address(address)}"
            raise RunError(f"{where}: has a store of format {found}, this version has {FORMAT}; give another number")
        self.read, self.remove = (self.client.register_script(one) for one in (EVENTS_OF, FORGET))

    def close(self) -> None:
        """As of `EventStore`."""
        with self.writes:
            self.closed = True
            self.client.close()

    @contextmanager
    def writing(self) -> Iterator[RedisTransaction]:
        """As of `EventStore`."""
        with self.writes, self._telling():
            token = self._turn()
            try:
                transaction = RedisTransaction(self, self._state())
                yield transaction
                self._commit(transaction, token)
            except BaseException:
                with suppress(self.errors.RedisError):  # the first error is the one to report
                    self.client.eval(RELEASE, 1, TURN, token)
                raise

    def events_of(self, user: str, most: int) -> tuple[LiveEvent, ...]:
        """As of `EventStore`."""
        with self._telling():
            rows = self.read(keys=[OF + user, EVENTS], args=[most]) if most else []
        parsed = [json.loads(row) for row in rows if row is not None]  # None: dropped just now
        return tuple(LiveEvent(*row[1:6], *row[7:8]) for row in parsed)

    def forget(self, users: Sequence[str]) -> dict[str, int]:
        """As of `EventStore`. Redis then writes its files anew, without them; its replicas and backups are not ours.

        Raises:
            StoreError: they could not be removed, or the files were not written within two minutes.
        """
        with self._telling():
            asked = dict.fromkeys(users)
            counts = {user: int(self.remove(keys=[OF + user, EVENTS, USERS], args=[user])) for user in asked}
            rewrite_files(self.client, self.snapshots)
        return {user: count for user, count in counts.items() if count}

    def counts(self, users: Sequence[str]) -> dict[str, int]:
        """As of `EventStore`."""
        asked = list(dict.fromkeys(users))
        with self._telling(), self.client.pipeline(transaction=False) as pipe:
            for user in asked:
                pipe.llen(OF + user)
            return {user: int(count) for user, count in zip(asked, pipe.execute(), strict=True) if count}

    def users(self) -> int:
        """As of `EventStore`."""
        with self._telling():
            return int(self.client.zcard(USERS))

    def items_after(self, seq: int) -> list[StoredItem]:
        """As of `EventStore`."""
        with self._telling():
            keys = self.client.zrangebyscore(CHANGES, f"({seq}", "+inf")
            rows = self.client.hmget(ITEMS, keys) if keys else []
        found = [(key, json.loads(row)) for key, row in zip(keys, rows, strict=True) if row is not None]
        items = [StoredItem(n, key, title, features) for key, (n, title, features) in found]
        return sorted(items, key=lambda item: item.seq)  # one of them may have been posted again meanwhile

    def log(self, after: int, most: int) -> list[LoggedEvent]:
        """As of `EventStore`."""
        rows: list[LoggedEvent] = []
        with self._telling():
            store = self._state()
            start, last = max(after + 1, int(store["first"])), int(store["seq"])
            while start <= last and len(rows) < most:
                numbers = range(start, min(start + 1000, last + 1))
                found = zip(numbers, self.client.hmget(EVENTS, [str(n) for n in numbers]), strict=True)
                rows += [_logged(n, row) for n, row in found if row is not None]
                start = numbers.stop
        return rows[:most]

    def identity(self) -> str:
        """As of `EventStore`."""
        with self._telling():
            return self._state()["id"]

    def _state(self) -> dict[str, str]:
        """The hash `store`. It is made where it is not, also after the database was emptied."""
        with self.client.pipeline() as pipe:
            fresh = {"id": secrets.token_hex(4), "format": FORMAT, "seq": 0, "items": 0, "first": 1}
            for name, value in fresh.items():
                pipe.hsetnx(STORE, name, value)
            pipe.hgetall(STORE)
            state: dict[str, str] = pipe.execute()[-1]
        return state

    def _turn(self) -> str:
        """Wait for the turn to write; the token that it has.

        Raises:
            StoreError: others have it for too long.
        """
        token, end = secrets.token_hex(8), time.monotonic() + PATIENCE
        while not self.client.set(TURN, token, nx=True, px=int(1000 * TURN_SECONDS)):
            if time.monotonic() > end:
                raise StoreError("events: other processes write the store for too long; nothing was taken, try again")
            time.sleep(LOOK)
        return token

    def _commit(self, transaction: RedisTransaction, token: str) -> None:
        """All changes, the limits and the end of the turn, in one MULTI.

        Raises:
            StoreError: the turn has run out, so that nothing was taken; or it is not known whether all was.
        """
        limits = self.limits
        with self.client.pipeline() as pipe:
            pipe.watch(TURN)
            if pipe.get(TURN) != token:
                raise StoreError("events: writing them took too long; nothing was taken, try again")
            pipe.multi()
            for command in transaction.changes:
                pipe.execute_command(*command)
            since = int(time.time() - limits.days * DAY)
            numbers = [limits.live_users, limits.events, since, 2 * limits.added_items, AT_ONCE]
            pipe.eval(DROP, 6, STORE, EVENTS, USERS, ITEMS, CHANGES, OF, *numbers)
            pipe.delete(TURN)
            try:
                pipe.execute()
            except self.errors.WatchError as error:
                raise StoreError("events: writing them took too long; nothing was taken, try again") from error
            except self.errors.exceptions.ExecAbortError:
                raise  # nothing was done
            except self.errors.RedisError as error:
                reason = first_line(error, self.address)
                raise StoreError(f"events: not known whether they were taken ({reason}); look, or try again") from error

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            if self.closed:  # the client would open another connection
                raise self.errors.ConnectionError("closed")
            yield
        except self.errors.RedisError as error:
            reason = first_line(error, self.address)
            raise StoreError(
                f"events: the store cannot be used now ({reason}); nothing was taken, try again"
            ) from error


class RedisTransaction:
    """As `event_store.Transaction`: changes that are sent together at the end.

    Args:
        state: the hash `store`, which nobody else changes meanwhile.
    """

    def __init__(self, store: RedisStore, state: Mapping[str, str]) -> None:
        self.store = store
        self.seq, self.items = int(state["seq"]), int(state["items"])
        self.changes: list[tuple[Any, ...]] = []
        self.added: dict[str, list[LiveEvent]] = {}

    def events_of(self, user: str, most: int) -> tuple[LiveEvent, ...]:
        """As of `Transaction`."""
        known = (*self.store.events_of(user, most), *self.added.get(user, ()))
        return known[max(0, len(known) - most) :]

    def add_event(self, user: str, event: LiveEvent) -> None:
        """As of `Transaction`."""
        self.seq += 1
        row = [user, event.item, event.event, event.value, event.timestamp, event.export, int(time.time())]
        row += [dict(event.context)] if event.context else []
        self.changes += [
            ("HSET", EVENTS, self.seq, json.dumps(row, ensure_ascii=False)),
            ("RPUSH", OF + user, self.seq),
            ("ZADD", USERS, self.seq, user),
            ("HSET", STORE, "seq", self.seq),
        ]
        self.added.setdefault(user, []).append(event)

    def add_item(self, key: str, title: str, features: Mapping[str, Any]) -> int:
        """As of `Transaction`."""
        self.items += 1
        self.changes += [
            ("HSET", ITEMS, key, json.dumps([self.items, title, dict(features)], ensure_ascii=False)),
            ("ZADD", CHANGES, self.items, key),
            ("HSET", STORE, "items", self.items),
        ]
        return self.items


def _logged(number: int, row: str) -> LoggedEvent:
    user, item, event, value, timestamp, _, _, *context = json.loads(row)
    return LoggedEvent(number, user, item, timestamp, event, value, context[0] if context else {})
