"""Latency and throughput of `flm serve` on loopback, beside raw faiss search of the same queries in the same run.

    python tools/benchmarks/serve.py --export exports/beauty                        # p50, p99, requests/s
    python tools/benchmarks/serve.py --items 1000000 --cache /tmp/made-up          # of made-up items and a random tower
    python tools/benchmarks/serve.py --export exports/one --next exports/two --minutes 10 --swaps 3  # counts failures
    python tools/benchmarks/serve.py --items 1000 --index flat --workers 1 2        # by processes, in turns: 4 minutes

A request is a history of 20 items and asks for the 10 best by the fused head. The server is a process of its own, the
client this one: keep-alive connections, each of which sends when it has been answered, see http_load.py. The floor is
what the server cannot do without, one query after another in one thread: the packaged tower, and the index of the same
export. With --workers: requests/s of servers of so many processes beside the floor, one connection alone, and p99 at
half of each one's peak, counted from when each request was due.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import faiss
import numpy as np
import psutil
import torch
from export import BRANDS, USERS, Alone, MadeUp, made_up_data
from http_load import KEY, Load, Tally, ask, request
from torch import Tensor

from flm_torchrec.config.schema import ModelConfig
from flm_torchrec.data.dataset import EntityFeatures, PreparedData, Ragged
from flm_torchrec.data.history import GAP_ROWS, Events
from flm_torchrec.export.manifest import FILE, IndexKind
from flm_torchrec.export.tower.compiled import compile_tower
from flm_torchrec.export.tower.reader import TowerQuery
from flm_torchrec.export.tower.writer import write_tower
from flm_torchrec.export.write import ExportOptions, ExportSource, export
from flm_torchrec.model.tower import Tower, Widths
from flm_torchrec.serve.loaded_export import load_export

HISTORY, K = 20, 10
DIM, MAX_HISTORY = 64, 50


class RandomModel:
    """A tower of the default size with the weights it begins with, over rows that are made up."""

    def __init__(self, data: PreparedData) -> None:
        torch.manual_seed(0)
        widths = Widths(1, 0, 0, 0, 2, MAX_HISTORY + 1)
        self.dense = Tower(widths, ModelConfig(dim=DIM))
        self.item_known = np.ones(data.schema.items, np.float32)
        self.user_known = np.ones(data.schema.users, np.float32)
        self.settings: dict[str, Any] = {
            "dim": DIM,
            "space": 2 * DIM,
            "max_history": MAX_HISTORY,
            "gaps": GAP_ROWS,
            "cosine": True,
            "fusion": "sum",
            "value_mean": 1.0,
            "value_scale": 0.0,
        }

    def rows(self, name: str, ids: np.ndarray, entity: str = "") -> Tensor:
        """[n] ids → [n, D], random."""
        first = int(ids[0]) if len(ids) else 0
        return torch.randn(len(ids), DIM, generator=torch.Generator().manual_seed(first)) * DIM**-0.5


def made_up_export(folder: Path, items: int, index: IndexKind, users: int = USERS, events: int = 1) -> Path:
    """An export of made-up items, kept for the next run."""
    target = folder / f"{items}-{users}-{events}-{index}"
    if (target / FILE).is_file():
        return target
    shutil.rmtree(folder / "data", ignore_errors=True)
    data = made_up_data(folder / "data", items, users, events)
    brands = Ragged(np.arange(items + 1), np.arange(items) % BRANDS)
    data = replace(
        data,
        items=EntityFeatures({"brand": brands}, np.zeros((items, 0), np.float32)),
        users=EntityFeatures({}, np.zeros((data.schema.users, 0), np.float32)),
    )
    model = RandomModel(data)
    source = ExportSource(
        data,
        MadeUp(2 * DIM),
        np.ones(items, bool),
        f"made-up-{items}",
        beside=lambda fresh: write_tower(data, model, True, "int8", fresh),
    )
    began = time.monotonic()
    manifest = export(source, Alone(), target, ExportOptions(index=index))
    assert manifest is not None
    print(f"made {target} in {time.monotonic() - began:.0f} s: {manifest.index}", flush=True)
    return target


def histories(keys: Sequence[str], count: int) -> list[list[int]]:
    """Rows of the items of `count` random histories."""
    rng = np.random.default_rng(0)
    return [rng.choice(len(keys), min(HISTORY, len(keys)), replace=False).tolist() for _ in range(count)]


def floor(folder: Path, count: int) -> tuple[list[bytes], dict[str, float]]:
    """Requests to send, and p50 seconds of the tower and of the index alone for the same."""
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    loaded = load_export(folder, 1)
    keys = loaded.catalogue.keys.to_pylist()
    rows = histories(keys, count)
    gap = loaded.tower.usual_gap
    queries = [
        TowerQuery(
            Events(np.array(r), np.arange(len(r)) * gap, np.zeros(len(r), np.int64), np.ones(len(r), np.float32))
        )
        for r in rows
    ]
    vectors: list[np.ndarray] = []
    tower = _each(lambda q: vectors.append(loaded.represent([q])[0].heads[-1]), queries)
    index = loaded.catalogue.index
    assert index is not None
    search = _each(lambda h: index.search(h[None], K + HISTORY), vectors)
    bodies = [json.dumps({"history": [{"item": keys[i]} for i in r], "k": K}).encode() for r in rows]
    return bodies, {"tower": tower, "index": search}


def _each(function: Callable[[Any], Any], given: Sequence[Any]) -> float:
    taken = []
    for one in given:
        began = time.perf_counter()
        function(one)
        taken.append(time.perf_counter() - began)
    return float(np.median(taken))


def load(
    port: int, bodies: Sequence[bytes], connections: int, seconds: float, rate: float = 0.0, items: int = K
) -> Tally:
    """Keep so many connections busy for so long, as of `Load`.

    Raises:
        SystemExit: a request failed: its time is none of an answer.
    """
    requests = [request(port, "/v1/recommend", body) for body in bodies]
    tally = Load(port, requests, connections, items, rate).run(seconds)
    if tally.failed:
        raise SystemExit(f"{len(tally.failed)} of {len(tally.seconds)} requests failed: {tally.failed[0]}")
    return tally


def swap(port: int, exports: Sequence[Path], swaps: int, seconds: float) -> None:
    """Swap evenly over the time, to each of the exports in turn."""
    for turn in range(swaps):
        time.sleep(seconds / (swaps + 1))
        began = time.monotonic()
        status, answer = ask(port, "/v1/swap", {"export": str(exports[(turn + 1) % len(exports)].resolve())})
        print(f"  swap: {status} {answer.decode()} in {time.monotonic() - began:.1f} s", flush=True)


def soak(
    port: int, bodies: list[bytes], connections: int, seconds: float, exports: Sequence[Path], swaps: int
) -> Tally:
    """Load with swaps meanwhile."""
    swapping = Thread(target=swap, args=(port, exports, swaps, seconds))
    swapping.start()
    tally = load(port, bodies, connections, seconds)
    swapping.join()
    return tally


def serve(folder: Path, port: int, workers: int = 1) -> subprocess.Popen[bytes]:
    """The server, once it answers."""
    command = [sys.executable, "-m", "flm_torchrec", "serve", "--export", str(folder), "--port", str(port)]
    process = subprocess.Popen(
        [*command, "--workers", str(workers)], env={**os.environ, "FLM_SERVE_KEYS": f"admin {KEY}"}
    )
    for _ in range(600):
        if process.poll() is not None:
            raise SystemExit("the server did not start; see above")
        try:
            ask(port, "/v1/recommend", {})
            return process
        except OSError:
            time.sleep(0.2)
    process.terminate()
    raise SystemExit("the server did not answer within two minutes")


def by_workers(args: argparse.Namespace, folder: Path, bodies: list[bytes], alone: float) -> None:
    """Servers of each number of processes, loaded in turns; the best round of each, and p99 at half of its rate.

    Others' load on the machine disturbs single rounds, so the best ones are compared; of p99 all are told.
    """
    print(f"floor: {1 / alone:.0f} requests/s, tower + index in one thread", flush=True)
    servers = [serve(folder, args.port + n, workers) for n, workers in enumerate(args.workers)]
    try:
        best = [0.0] * len(servers)
        used = [_used(server) for server in servers]
        done = [0] * len(servers)
        for _ in range(args.rounds):
            for n in range(len(servers)):
                tally = load(args.port + n, bodies, max(args.connections), args.seconds)
                best[n] = max(best[n], tally.rate)
                done[n] += len(tally.seconds)
        for n, (server, workers) in enumerate(zip(servers, args.workers, strict=True)):
            cost = (_used(server) - used[n]) / done[n]
            single = min(
                (load(args.port + n, bodies, 1, args.seconds) for _ in range(2)), key=lambda t: t.quantile(0.5)
            )
            halves = [
                load(args.port + n, bodies, max(args.connections), args.seconds, best[n] / 2)
                for _ in range(args.rounds)
            ]
            p99 = sorted(tally.quantile(0.99) for tally in halves)
            late = max(float(np.quantile(tally.late, 0.99)) * 1e3 for tally in halves)
            print(
                f"{workers} workers: {best[n]:.0f} requests/s, {best[n] / best[0]:.2f} x the first,"
                f" {best[n] * alone:.2f} x the floor; {cost * 1e3:.2f} ms of processor a request;"
                f" one connection p50 {single.quantile(0.5):.2f} ms, p99 {single.quantile(0.99):.2f} ms;"
                f" at half of that rate p99 {', '.join(f'{one:.1f}' for one in p99)} ms, each a round,"
                f" of it up to {late:.1f} ms until sent",
                flush=True,
            )
    finally:
        for server in servers:
            server.terminate()
            server.wait()


def _used(server: subprocess.Popen[bytes]) -> float:
    """Seconds of processor that a server's processes have used."""
    own = psutil.Process(server.pid)
    return sum(sum(one.cpu_times()[:2]) for one in (own, *own.children()))


def resident(process: subprocess.Popen[bytes]) -> float:
    """Megabytes."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def main() -> None:
    """Measure a server of an export, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--export", type=Path, help="export to serve")
    what.add_argument("--items", type=int, help="serve an export of so many made-up items")
    parser.add_argument("--cache", type=Path, default=Path("made-up"), help="folder of made-up exports")
    parser.add_argument("--index", choices=("flat", "hnsw", "ivfpq"), default="hnsw", help="of made-up items")
    parser.add_argument("--next", type=Path, help="export to swap to and back from; default: the same again")
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--seconds", type=float, default=10.0, help="of load for each number of connections")
    parser.add_argument("--minutes", type=float, default=0.0, help="of load by 4 connections, with swaps")
    parser.add_argument("--swaps", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="compile the tower for this machine first")
    parser.add_argument("--workers", type=int, nargs="+", help="compare servers of so many processes, in turns")
    parser.add_argument("--rounds", type=int, default=5, help="of load for each number of workers")
    parser.add_argument("--requests", type=int, default=1000, help="different ones")
    parser.add_argument("--port", type=int, default=8765)
    args = parser.parse_args()
    folder = args.export or made_up_export(args.cache, args.items, args.index)
    if args.compile:
        print(compile_tower(folder), flush=True)
    bodies, alone = floor(folder, args.requests)
    both = sum(alone.values())
    print(f"{folder}: alone p50, tower {alone['tower'] * 1e3:.2f} ms, index {alone['index'] * 1e3:.2f} ms", flush=True)
    if args.workers:
        by_workers(args, folder, bodies, both)
        return
    process = serve(folder, args.port)
    try:
        load(args.port, bodies, 2, 1.0)  # caches and allocators
        for connections in args.connections if not args.minutes else ():
            tally = load(args.port, bodies, connections, args.seconds)
            p50 = tally.quantile(0.5) / 1e3
            print(f"{connections:3} connections: {tally}  {p50 / both:.1f} x tower + index", flush=True)
        print(f"server's memory {resident(process):.0f} MB", flush=True)
        if args.minutes:
            before, seconds = resident(process), args.minutes * 60
            exports = [folder, args.next or folder]
            tally = soak(args.port, bodies, 4, seconds, exports, args.swaps)
            print(f"{args.minutes:g} minutes, {args.swaps} swaps: {tally}")
            print(f"  and after it {resident(process):.0f} MB, {before:.0f} before")
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main()
