"""`flm serve`."""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import signal
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from socket import socket
from typing import TYPE_CHECKING

from flm_torchrec.cli.error_line import tell
from flm_torchrec.cli.serve_options import add_options, allowed_hosts, api_keys, certificate, check, store_address
from flm_torchrec.errors import FlmError, RunError

if TYPE_CHECKING:
    from flm_torchrec.serve.access import ApiKeys
    from flm_torchrec.serve.server import Certificate
    from flm_torchrec.serve.supervisor import Link, Swapped
    from flm_torchrec.serve.variants import Variants

LOOPBACK = ("127.0.0.1", "localhost", "::1")
SHARED_METRICS = "PROMETHEUS_MULTIPROC_DIR"
"""Variable that names prometheus_client the folder in which processes share their counts."""


@dataclass(frozen=True)
class Edge:
    """What faces the clients."""

    bound: socket
    """Listens."""
    most: int
    """Connections that fit into the limit of open files."""
    keys: ApiKeys
    tls: Certificate | None

    def url(self, args: argparse.Namespace) -> str:
        """The address to show."""
        return f"{'https' if self.tls else 'http'}://{args.host}:{args.port}"


@dataclass(frozen=True)
class WorkerStart:
    """What a worker begins with."""

    link: Link
    """To the supervisor."""
    swapped: Swapped
    """By name, what was swapped in for the exports of the options."""
    exports: Path
    """Folder of the arrays that all workers map."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `serve` to the subcommands."""
    parser = subparsers.add_parser(
        "serve",
        help="answer over HTTP from an export, with a web page",
        description="Answer over HTTP from an export made with its user tower: recommendations for known and cold"
        " users, from histories and features; new items, new events and new exports are taken up while it runs.",
        allow_abbrev=False,
    )
    add_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Serve an export until SIGTERM or Ctrl-C.

    Raises:
        RunError: an option, the address or the export is wrong.
    """
    check(args)
    keys = api_keys(args)
    tls = certificate(args)
    # Imported here: it takes a second, and a wrong option should be reported at once.
    from flm_torchrec.export.manifest import read_manifest
    from flm_torchrec.serve.connections import listening, most_connections

    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn has its own handler while it serves
        signal.signal(number, _stop)
    edge = Edge(listening(args.host, args.port), most_connections(), keys, tls)
    if not (keys or args.host in LOOPBACK or args.without_keys):
        raise RunError(
            f"--host {args.host}: others could reach the server; give --keys FILE, or --without-keys to trust them all"
        )
    if args.similar_users and not keys:
        raise RunError("--similar-users: tells of one person from what others did; give --keys FILE")
    for export in args.export:
        read_manifest(export)  # no store is made beside what is no export
    if args.compile:
        _compile(args.export)
    if args.workers == 1:
        with _imported_first():
            _serve(args, edge)
    else:
        _supervise(args, edge)


def _compile(exports: Sequence[Path]) -> None:
    """Compile towers in a process of its own: workers are forked from this one, which must not have used threads.

    Raises:
        SystemExit: that process failed; it has said why.
    """
    process = get_context("spawn").Process(target=_compile_all, args=(exports,))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(2)


def _compile_all(exports: Sequence[Path]) -> None:
    from flm_torchrec.export.tower.compiled import compile_tower

    try:
        for export in exports:
            print(compile_tower(export), flush=True)
    except FlmError as error:
        tell(str(error))
        raise SystemExit(error.exit_code) from error


def _supervise(args: argparse.Namespace, edge: Edge) -> None:
    """Run the workers until SIGTERM or Ctrl-C.

    Raises:
        SystemExit: a worker could not begin; it has said why.
    """
    from flm_torchrec.serve.server_folder import EXPORTS, METRICS, server_folder
    from flm_torchrec.serve.supervisor import Supervisor

    supervisor = os.getpid()

    def fail(error: BaseException) -> int:
        if isinstance(error, FlmError):
            tell(str(error))
            return error.exit_code
        traceback.print_exception(error)
        return 1

    with server_folder() as folder:
        os.environ[SHARED_METRICS] = str(folder / METRICS)

        def work(link: Link, swapped: Swapped) -> None:
            try:
                _serve(args, edge, WorkerStart(link, swapped, folder / EXPORTS))
            finally:
                if os.getppid() != supervisor:  # it was killed, so nobody else removes the folder
                    shutil.rmtree(folder, ignore_errors=True)

        ready = partial(print, f"{edge.url(args)} from {args.workers} processes", flush=True)
        with _imported_first():
            code = Supervisor(work, fail, ready, edge.bound.close).run(args.workers)
    if code:
        raise SystemExit(code)


@contextmanager
def _imported_first() -> Iterator[None]:
    """Import all that serving runs. Forks share it in memory, and a crashed worker is back soon."""
    import pyarrow.dataset  # noqa: F401 (loading an export would import this and the next one, 100 MB of modules)
    import torch._functorch.aot_autograd  # noqa: F401

    from flm_torchrec.serve import app, server  # noqa: F401

    gc.collect()
    # Garbage is not looked for among all these objects: that would hold up requests, and the collector of a fork would
    # write into the pages of all of them.
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()  # else modules of C++ find their objects still there at the end, and print them as leaked


def _serve(args: argparse.Namespace, edge: Edge, worker: WorkerStart | None = None) -> None:
    """Serve in this process until SIGTERM or Ctrl-C.

    Args:
        worker: where this process is one of several.

    Raises:
        RunError: an export or the store cannot be used.
    """
    # Imported here: PyTorch takes seconds, and a wrong option should be reported at once.
    from flm_torchrec.serve.app import ServerLimits, create_app
    from flm_torchrec.serve.connections import ConnectionLimits
    from flm_torchrec.serve.server import Tell, serve
    from flm_torchrec.serve.tracing import collector

    served = _variants(args, worker)
    limits = ServerLimits(
        threads=args.threads,
        waiting=args.waiting,
        watch_seconds=args.watch,
        hosts=allowed_hosts(args),
        keys=edge.keys,
        rate=args.rate / args.workers,
        log_requests=args.log_requests,
        traces=collector(args.traces) if args.traces else None,
    )
    connections = ConnectionLimits(min(edge.most, args.connections or edge.most))
    if worker is None:
        for service, share in zip(served.services, served.split.shares, strict=True):
            manifest, to = service.loaded.manifest, f"; {share:.4g} of the users" if share < 1 else ""
            sizes = f"{manifest.items} items, {manifest.users} users; model {manifest.model_version}"
            how = "; compiled tower" if service.loaded.tower.compiled else ""
            print(f"{service.loaded.folder}: {sizes}{how}{to}")
        tell_all = Tell(partial(print, edge.url(args), flush=True))
    else:
        worker.link.follow(served.follow)
        tell_all = Tell(partial(worker.link.tell, {"ready": True}), partial(worker.link.tell, {"stopping": True}))
    serve(create_app(served, limits), edge.bound, connections, edge.tls, tell_all)


def _variants(args: argparse.Namespace, worker: WorkerStart | None) -> Variants:
    """The exports of the options, or what was swapped in for them, loaded.

    Raises:
        RunError: an export or the store cannot be used.
    """
    from flm_torchrec.serve.event_store import StoreLimits
    from flm_torchrec.serve.live_store import open_store
    from flm_torchrec.serve.server_folder import SharedExports
    from flm_torchrec.serve.service import Service, ServiceOptions
    from flm_torchrec.serve.split import export_name, read_split
    from flm_torchrec.serve.variants import Variants

    store = open_store(store_address(args), StoreLimits(days=args.keep_days, events=args.keep_events))
    options = ServiceOptions(args.similar_users, args.least_recall)
    swapped: Swapped = {}
    if worker is not None:
        link, swapped, shared = worker.link, worker.swapped, SharedExports(worker.exports)
        options = replace(options, shared=shared, announce=lambda name, state: link.tell({"swapped": {name: state}}))
    before = {name: Path(state["export"]) for name, state in swapped.items()}
    services = [Service(export, store, before.get(export_name(export)), options) for export in args.export]
    served = Variants(services, read_split(args.split, len(services), args.split_salt))
    served.follow(swapped)  # canaries
    return served


def _stop(number: int, frame: object) -> None:
    """Exit with code 0: a stop on request is no error."""
    raise SystemExit(0)
