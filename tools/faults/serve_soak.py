"""Load on `flm serve` for long, with swaps, restarts, and clients that hold connections; no good request may fail.

    python tools/faults/serve_soak.py --export exports/one --next exports/two --minutes 30 --rate 20

The server may open few files (`--files`). Against it go, all at once:

* good clients, which ask at a steady rate, post an event now and then, and open a new connection now and then, or when
  an answer says `Connection: close`. A client whose connection is closed before any byte of an answer asks once more on
  a new one, as HTTP clients do (RFC 9110, 9.2.2): a server may close an idle connection at any time;
* more silent connections than the server may have, connections that send a header or a body a byte a second, and
  connections that take no answer;
* swaps to and fro between two exports;
* restarts of one worker at a time with SIGTERM.

Prints the memory of all processes (PSS) as it goes. Exits 1 if a good request failed, or a swap did.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from serve_kills import HOST, K, ask, start

from flm_torchrec.export.manifest import read_manifest
from flm_torchrec.export.parts import ExportRows

KEY = "the-key-of-the-soak-test"
CLIENTS = 4
EVENT_EVERY, CONNECT_EVERY = 10, 20
"""A good client posts an event instead of asking, and opens a new connection, at every such request."""
PATIENCE = 30.0
"""Seconds for which a good client waits for an answer."""
SAMPLES = 60.0
"""Seconds between two readings of the memory."""
SLOW = 5
"""Connections of each slow kind."""


@dataclass
class SoakSeen:
    """What happened."""

    seconds: list[float] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    again: int = 0
    """Requests sent once more."""
    swaps: int = 0
    restarts: int = 0
    held: int = 0
    """Connections that bad clients opened."""
    memory: list[float] = field(default_factory=list)
    """MB, of all processes together."""

    def fail(self, reason: str) -> None:
        """Count a failure, and print it."""
        self.failed.append(reason)
        print(f"failed: {reason}", flush=True)


@dataclass(frozen=True)
class SoakTrial:
    """A running server and what is done to it."""

    args: argparse.Namespace
    server: psutil.Process
    users: list[str]
    items: list[str]
    seen: SoakSeen
    end: float

    @property
    def over(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() >= self.end

    async def pause(self, seconds: float) -> None:
        """Wait, but not beyond the end."""
        await asyncio.sleep(max(0.0, min(seconds, self.end - time.monotonic())))

    async def connect(self) -> Any:
        """A connection to the server."""
        return await asyncio.open_connection(HOST, self.args.port)


async def good_client(trial: SoakTrial, number: int) -> None:
    """Ask at a steady rate."""
    chance, streams, turn = random.Random(number), None, 0
    pause = CLIENTS / trial.args.rate
    while not trial.over:
        turn += 1
        if streams is not None and (turn % CONNECT_EVERY == 0 or streams[1].is_closing()):
            streams[1].close()
            streams = None
        user = chance.choice(trial.users)
        path, body = "/v1/recommend", {"user": user, "k": K}
        if turn % EVENT_EVERY == 0:
            path, body = "/v1/events", {"user": f"soak-{number}", "item": chance.choice(trial.items)}
        began = time.perf_counter()
        streams = await good_request(trial, streams, path, body)
        trial.seen.seconds.append(time.perf_counter() - began)
        await trial.pause(pause * chance.uniform(0.5, 1.5))


async def good_request(trial: SoakTrial, streams: Any, path: str, body: Any) -> Any:
    """One request; the connection for the next one."""
    for last in (False, True):
        try:
            async with asyncio.timeout(PATIENCE):
                streams = streams or await trial.connect()
                told = await ask(streams, "POST", path, body, KEY)
        except (OSError, asyncio.IncompleteReadError) as error:
            nothing = isinstance(error, ConnectionError) or not getattr(error, "partial", b"x")
            streams = None
            if nothing and not last:
                trial.seen.again += 1
                continue
            trial.seen.fail(f"{path}: {error!r}")
            return None
        right = isinstance(told, dict) and (path != "/v1/recommend" or len(told["items"]) == K)
        if not right:
            trial.seen.fail(f"{path}: {told!r:.200}")
        return streams


async def silent(trial: SoakTrial) -> None:
    """Hold more connections than the server may have; open new ones where it has closed some."""
    held: list[socket.socket] = []
    while not trial.over:
        held = [one for one in held if _is_open(one)]
        for _ in range(trial.args.files - len(held)):
            with suppress(OSError):
                one = socket.create_connection((HOST, trial.args.port), timeout=1)
                one.setblocking(False)
                held.append(one)
                trial.seen.held += 1
            await asyncio.sleep(0.002)
        await trial.pause(5)
    for one in held:
        one.close()


def _is_open(one: socket.socket) -> bool:
    try:
        if one.recv(1) == b"":
            one.close()
            return False
    except BlockingIOError:
        return True
    except OSError:
        one.close()
        return False
    return True


async def dripping(trial: SoakTrial, head: bytes) -> None:
    """Send a request a byte a second, again and again."""
    while not trial.over:
        with suppress(OSError):
            _, writer = await trial.connect()
            trial.seen.held += 1
            writer.write(head)
            for _ in range(60):
                writer.write(b"a")
                await writer.drain()
                await trial.pause(1)
            writer.close()
        await trial.pause(0.5)


async def taking_nothing(trial: SoakTrial) -> None:
    """Ask for a large answer many times on one connection, and read none."""
    request = f"GET /openapi.json HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode()
    while not trial.over:
        with suppress(OSError):
            one = socket.socket()
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            one.connect((HOST, trial.args.port))
            trial.seen.held += 1
            one.sendall(request * 20)
            await trial.pause(40)
            one.close()
        await trial.pause(0.5)


async def swapping(trial: SoakTrial, exports: list[Path]) -> None:
    """Swap to and fro, evenly over the time."""
    pause = trial.args.minutes * 60 / (trial.args.swaps + 1)
    for turn in range(trial.args.swaps):
        await trial.pause(pause)
        if trial.over:
            return
        streams = await trial.connect()
        told = await ask(streams, "POST", "/v1/swap", {"export": str(exports[(turn + 1) % 2].resolve())}, KEY)
        streams[1].close()
        if isinstance(told, dict):
            trial.seen.swaps += 1
        else:
            trial.seen.fail(f"swap: {told}")


async def restarting(trial: SoakTrial) -> None:
    """End one worker at a time with SIGTERM, and wait until another is in its place."""
    pause = trial.args.minutes * 60 / (trial.args.restarts + 1)
    chance = random.Random(0)
    for turn in range(trial.args.restarts):
        await trial.pause(pause / 2 if turn == 0 else pause)  # not when exports are swapped
        workers = trial.server.children()
        if trial.over or len(workers) < trial.args.workers:
            continue
        chance.choice(workers).send_signal(signal.SIGTERM)
        trial.seen.restarts += 1


async def watching(trial: SoakTrial) -> None:
    """Read the memory as it goes."""
    while not trial.over:
        await trial.pause(SAMPLES)
        memory, seen = pss(trial.server), trial.seen
        seen.memory.append(memory)
        print(f"{len(seen.seconds)} requests, {len(seen.failed)} failed, {memory:.0f} MB", flush=True)


def pss(server: psutil.Process) -> float:
    """MB of the server's processes; pages that several share count once."""
    total = 0
    for one in (server, *server.children()):
        with suppress(psutil.Error):  # it has just ended
            total += one.memory_full_info().pss
    return total / 2**20


async def soak(args: argparse.Namespace, process: subprocess.Popen[str]) -> SoakSeen:
    """All at once."""
    manifest = read_manifest(args.export)
    users = ExportRows(args.export, manifest, "users").table(["user_key"])["user_key"].to_pylist()[:1000]
    items = ExportRows(args.export, manifest, "items").table(["item_key"])["item_key"].to_pylist()[:100]
    seen = SoakSeen()
    trial = SoakTrial(args, psutil.Process(process.pid), users, items, seen, time.monotonic() + args.minutes * 60)
    header = b"POST /v1/recommend HTTP/1.1\r\nHost: localhost\r\n"
    body = header + f"X-API-Key: {KEY}\r\nContent-Type: application/json\r\nContent-Length: 900\r\n\r\n".encode()
    tasks: list[Coroutine[Any, Any, None]] = [good_client(trial, number) for number in range(CLIENTS)]
    tasks += [silent(trial), swapping(trial, [args.export, args.next]), restarting(trial), watching(trial)]
    for _ in range(SLOW):
        tasks += [dripping(trial, header), dripping(trial, body), taking_nothing(trial)]
    await asyncio.gather(*tasks)
    return seen


def main() -> int:
    """Run the soak, print what was seen, and give 1 where something failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--export", type=Path, required=True)
    parser.add_argument("--next", type=Path, help="export to swap to and back from; default: the same again")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--rate", type=float, default=20.0, help="good requests a second")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--swaps", type=int, default=10)
    parser.add_argument("--restarts", type=int, default=10)
    parser.add_argument("--files", type=int, default=512, help="that the server may have open")
    parser.add_argument("--port", type=int, default=8767)
    args = parser.parse_args()
    args.next = args.next or args.export
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    with tempfile.TemporaryDirectory() as folder:
        process = start(
            args,
            Path(folder) / "events.sqlite",
            args.workers,
            env={**os.environ, "FLM_SERVE_KEYS": f"admin {KEY}"},
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (args.files, args.files)),
        )
        try:
            seen = asyncio.run(soak(args, process))
        finally:
            process.terminate()
            process.wait()
    times = sorted(seen.seconds)
    p50, p99 = (times[int(len(times) * share)] * 1000 for share in (0.5, 0.99))
    print(f"{args.minutes:g} minutes: {len(times)} good requests, {len(seen.failed)} failed, {seen.again} sent again;")
    print(f"p50 {p50:.1f} ms, p99 {p99:.1f} ms, longest {times[-1] * 1000:.0f} ms; {seen.held} connections held;")
    print(f"{seen.swaps} swaps, {seen.restarts} restarts; memory {[round(one) for one in seen.memory]} MB")
    print(*seen.failed[:10], sep="\n")
    return int(bool(seen.failed))


if __name__ == "__main__":
    sys.exit(main())
