"""Kill processes of `flm serve` under load, and check that nothing acknowledged is lost and no answer is wrong.

    python tools/faults/serve_kills.py --export exports/synthetic --kills 20

Clients post events of users of their own, one after the other, and ask for these users' events and recommendations.
In turns, one worker is killed, the supervisor and all workers are, after which the server is started anew, and one
worker is ended with SIGTERM. A client that is cut off connects again and posts the next event. Only connections to such
a process may be cut off.
At the end each user's events must be those that were acknowledged, in order; an event whose answer was cut off may be
there or not. Exits 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from flm_torchrec.export.manifest import read_manifest
from flm_torchrec.export.parts import ExportRows
from flm_torchrec.serve.event_store import EventStore

HOST, K = "127.0.0.1", 5
KINDS = ("one worker", "all", "one worker, SIGTERM")


@dataclass
class ClientsSaw:
    """What the clients saw."""

    acknowledged: dict[str, list[str]] = field(default_factory=dict)
    unsure: dict[str, list[str]] = field(default_factory=dict)
    """Items whose answers were cut off, each with the number of acknowledged events before it."""
    answers: int = 0
    cut_off: int = 0
    drained: int = 0
    """Those of them that a worker cut off which was told to end."""
    dead: set[int] = field(default_factory=set)
    """Ports of the clients' connections to processes that were killed."""
    told: set[int] = field(default_factory=set)
    """The same to workers that were told to end, by SIGTERM."""
    down: bool = False
    """All processes have been killed, so that any connection may end."""
    wrong: list[str] = field(default_factory=list)


async def ask(streams: Any, method: str, path: str, body: Any = None, key: str = "") -> Any:
    """One request on an open connection; its answer, or the reason as a text. Closes it where the server says so."""
    reader, writer = streams
    content = json.dumps(body).encode() if body is not None else b""
    head = f"{method} {path} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\nX-API-Key: {key}\r\n"
    writer.write(head.encode() + f"Content-Length: {len(content)}\r\n\r\n".encode() + content)
    answer = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    length = answer.partition("content-length:")[2].partition("\r\n")[0].strip()
    content = await reader.readexactly(int(length)) if length else b"without a length"
    if "connection: close" in answer:
        writer.close()
    return json.loads(content) if answer.split(" ", 2)[1] == "200" else f"{answer[:15]} {content.decode()}"


async def connected(port: int, done: asyncio.Event, streams: Any = None) -> Any:
    """The connection where it may still be used, or else another one as soon as there is a server."""
    if streams is not None and not streams[1].is_closing():
        return streams
    while not done.is_set():
        try:
            return await asyncio.open_connection(HOST, port)
        except OSError:
            await asyncio.sleep(0.05)
    return None


async def client(port: int, user: str, items: list[str], seen: ClientsSaw, done: asyncio.Event) -> None:
    """Post, read back and ask, until all is done."""
    mine, unsure = seen.acknowledged.setdefault(user, []), seen.unsure.setdefault(user, [])
    streams, number = None, 0
    while not done.is_set():
        streams = await connected(port, done, streams)
        if streams is None:
            return
        item, number = items[number % len(items)], number + 1
        posting = True
        try:
            told = await ask(streams, "POST", "/v1/events", {"user": user, "item": item})
            posting = False
            if isinstance(told, str):
                seen.wrong.append(told)
                continue
            mine.append(item)
            streams = await connected(port, done, streams)
            events = await ask(streams, "GET", f"/v1/events?user={user}") if streams else None
            streams = await connected(port, done, streams)
            answer = await ask(streams, "POST", "/v1/recommend", {"user": user, "k": K}) if streams else None
            if streams is not None:
                check(events, answer, user, seen)
        except (OSError, asyncio.IncompleteReadError) as error:
            seen.cut_off += 1
            port_here = streams[1].get_extra_info("sockname")[1]
            seen.drained += not seen.down and port_here in seen.told
            if not seen.down and port_here not in seen.dead | seen.told:
                seen.wrong.append(f"{user}: cut off from a process that was not killed: {error!r}")
            streams = None
            if posting:
                unsure.append(item)


def check(events: Any, answer: Any, user: str, seen: ClientsSaw) -> None:
    """Note what is wrong: the user's events end with the last one acknowledged, and its item is not recommended."""
    mine = seen.acknowledged[user]
    last = events[-1]["item"] if isinstance(events, list) else events
    found = [item["item"] for item in answer["items"]] if isinstance(answer, dict) else [answer]
    seen.answers += 3
    if last != mine[-1] or not found or mine[-1] in found:
        seen.wrong.append(f"{user}: after {mine[-1]} of {len(mine)} (unsure {len(seen.unsure[user])}): {last}, {found}")


def start(args: argparse.Namespace, store: Path, workers: int = 2, **process: Any) -> subprocess.Popen[str]:
    """The server, once it is ready.

    Args:
        process: options of its `subprocess.Popen`.
    """
    options = [
        "--export",
        str(args.export),
        "--port",
        str(args.port),
        "--workers",
        str(workers),
        "--events",
        str(store),
    ]
    command = [sys.executable, "-m", "flm_torchrec", "serve", *options]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **process)
    assert started.stdout is not None
    if not started.stdout.readline():
        raise SystemExit("the server did not start; see above")
    return started


def end(process: psutil.Process, seen: ClientsSaw, how: signal.Signals) -> None:
    """End a process, and note which connections it had: it is stopped before, so that it accepts no more."""
    process.send_signal(signal.SIGSTOP)
    ports = seen.dead if how == signal.SIGKILL else seen.told
    ports |= {one.raddr.port for one in process.net_connections("tcp") if one.raddr}
    process.send_signal(how)
    with suppress(psutil.NoSuchProcess):
        process.send_signal(signal.SIGCONT)


async def kill(args: argparse.Namespace, store: Path, seen: ClientsSaw) -> subprocess.Popen[str]:
    """Kill as often as asked, in turns as in `KINDS`; the server that runs at the end."""
    chance = random.Random(args.seed)
    process = await asyncio.to_thread(start, args, store)
    for number in range(args.kills):
        await asyncio.sleep(args.pause * chance.uniform(0.5, 1.5))
        workers = psutil.Process(process.pid).children()
        if number % 3 == 1:
            seen.down = True
            for victim in [psutil.Process(process.pid), *workers]:
                victim.send_signal(signal.SIGKILL)
            process.wait()
            process = await asyncio.to_thread(start, args, store)
            seen.down = False
        else:
            end(chance.choice(workers), seen, signal.SIGTERM if number % 3 == 2 else signal.SIGKILL)
        print(f"kill {number + 1}: {KINDS[number % 3]}", flush=True)
    await asyncio.sleep(args.pause)
    return process


def lost(store: EventStore, seen: ClientsSaw) -> list[str]:
    """Users whose events in the store are not those acknowledged, with those unsure left out, in order."""
    problems = []
    for user, mine in seen.acknowledged.items():
        kept = [item for _, one, item, *_ in store.log(0, 10**9) if one == user]
        rest = iter(kept)
        missing = [item for item in mine if item not in rest]
        if missing or len(kept) > len(mine) + len(seen.unsure[user]):
            problems.append(f"{user}: {len(mine)} acknowledged, {len(kept)} kept, {len(missing)} lost")
    return problems


async def trial(args: argparse.Namespace, store: Path) -> ClientsSaw:
    """Load and kills at once."""
    rows = ExportRows(args.export, read_manifest(args.export), "items")
    items = rows.table(["item_key"])["item_key"].to_pylist()[: args.items]
    seen, done = ClientsSaw(), asyncio.Event()
    clients = [client(args.port, f"kill-test-{n}", items, seen, done) for n in range(args.clients)]
    running = [asyncio.create_task(one) for one in clients]
    process = await kill(args, store, seen)
    done.set()
    await asyncio.gather(*running)
    process.terminate()
    process.wait()
    return seen


def main() -> int:
    """Run the trial, print what was seen, and give 1 where something was lost or wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--export", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--pause", type=float, default=2.0, help="seconds between kills, on the average")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--items", type=int, default=100, help="different ones in events")
    parser.add_argument("--port", type=int, default=8766)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "events.sqlite"
        seen = asyncio.run(trial(args, store))
        problems = lost(EventStore(store), seen)
    events = sum(map(len, seen.acknowledged.values()))
    print(f"{args.kills} kills: {events} events acknowledged, {len(problems)} users with lost events,")
    print(f"{seen.answers} answers, {len(seen.wrong)} wrong, {seen.cut_off} requests cut off,")
    print(f"{seen.drained} of them by workers that were told to end")
    print(*problems, *seen.wrong[:5], sep="\n")
    return int(bool(problems or seen.wrong or not events))


if __name__ == "__main__":
    sys.exit(main())
