"""Where the processor time of a request to `flm serve` goes: each part by itself, then all of them in one process.

    python tools/benchmarks/serve_parts.py --cache /tmp/made-up     # 1,000 made-up items, a flat index, compiled tower

A part alone finds its data in the processor's caches; in a whole request other parts have been there before it. The
figures are the best of several rounds, in microseconds of one thread, without sockets and the event loop's waiting.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from http_load import KEY, request
from serve import floor, made_up_export
from starlette.responses import Response

from flm_torchrec.export.tower.compiled import compile_tower
from flm_torchrec.serve.access import read_keys
from flm_torchrec.serve.answers import asked_user, recommended
from flm_torchrec.serve.app import ServerLimits, create_app
from flm_torchrec.serve.live_store import open_store
from flm_torchrec.serve.messages import Recommend
from flm_torchrec.serve.middleware import json_bytes, parse
from flm_torchrec.serve.quick import QuickRequest, QuickRequests, encoded
from flm_torchrec.serve.service import Service

CLIENT = ("127.0.0.1", 1)
ROUNDS = 5
BATCH = 16


def told(name: str, call: Callable[[Any], Any], given: Sequence[Any], each: int = 1) -> None:
    """Print the time of a call for one of `each` requests in it."""
    taken = []
    for _ in range(ROUNDS):
        began = time.thread_time()
        for one in given:
            call(one)
        taken.append((time.thread_time() - began) / len(given) / each)
    print(f"{name:58} {min(taken) * 1e6:7.0f}", flush=True)


def batches(given: Sequence[Any]) -> list[Sequence[Any]]:
    """Groups of BATCH."""
    return [given[start : start + BATCH] for start in range(0, len(given) - BATCH + 1, BATCH)]


def parts(service: Service, quick: QuickRequests, sent: Sequence[bytes]) -> None:
    """Print each part of a request."""
    loaded = service.loaded
    taken = [one for data in sent if (one := quick.take(data, CLIENT))]
    asked = [parse(Recommend, one.body) for one in taken]
    users = [asked_user(loaded, service.store, one) for one in asked]
    found = loaded.represent([user.query for user in users])
    given = list(zip(asked, users, found, strict=True))
    answers = [recommended(loaded, *one) for one in given]
    bodies = [json_bytes(answer) for answer in answers]
    told("header read, host and key checked", lambda data: quick.take(data, CLIENT), sent)
    told("JSON read and validated", lambda one: parse(Recommend, one.body), taken)
    told("a look for new cold items in the store", lambda _: service.current(), asked)
    told("keys and times of the history", lambda one: asked_user(loaded, service.store, one), asked)
    told("tower with its inputs, one request", lambda one: loaded.represent([one.query]), users)
    told(f"tower with its inputs, one of {BATCH}", lambda some: loaded.represent([one.query for one in some]),
         batches(users), BATCH)  # fmt: skip
    told("best items", lambda one: recommended(loaded, *one), given)
    told("JSON written", json_bytes, answers)
    for one in taken:
        one.scope["state"].update(request_id="one", exports=[service.name])
    told("counted and timed", lambda one: quick.records.add(one.scope, 200, 0.001), taken)
    told("answer put together", lambda body: encoded(Response(body, media_type="application/json"), []), bodies)
    told("all of the service, one request", lambda one: service.recommend([one]), asked)
    told(f"all of the service, one of {BATCH}", service.recommend, batches(asked), BATCH)


async def whole(quick: QuickRequests, sent: Sequence[bytes], at_once: int) -> None:
    """Print the time of the event loop's thread for a whole request, where so many come at once."""

    async def ask(data: bytes) -> None:
        taken: QuickRequest | None = quick.take(data, CLIENT)
        assert taken is not None
        answered: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
        left = quick.begin(taken, answered.set_result)
        if left is not None:
            await left
        assert (await answered).status_code == 200

    seconds = []
    for _ in range(ROUNDS):
        began = time.thread_time()
        for start in range(0, len(sent), at_once):
            await asyncio.gather(*(ask(data) for data in sent[start : start + at_once]))
        seconds.append(time.thread_time() - began)
    print(f"{f'whole request without sockets, {at_once} at once':58} {min(seconds) / len(sent) * 1e6:7.0f}", flush=True)


async def wholes(quick: QuickRequests, sent: Sequence[bytes]) -> None:
    """One at a time, and in batches."""
    for at_once in (1, BATCH):
        await whole(quick, sent, at_once)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1000, help="made-up ones")
    parser.add_argument("--cache", type=Path, default=Path("made-up"), help="folder of made-up exports")
    args = parser.parse_args()
    folder = made_up_export(args.cache, args.items, "flat")
    print(compile_tower(folder))
    bodies, _ = floor(folder, 320)
    sent = [request(80, "/v1/recommend", body) for body in bodies]
    with tempfile.TemporaryDirectory() as store:
        service = Service(folder, open_store(f"{store}/events.sqlite"))
        keys = read_keys(f"admin {KEY}", "the benchmark")
        quick: QuickRequests = create_app(service, ServerLimits(keys=keys, hosts=("address",))).state.quick
        parts(service, quick, sent)
        asyncio.run(wholes(quick, sent))
        service.store.close()


if __name__ == "__main__":
    main()
