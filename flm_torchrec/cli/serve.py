"""`flm serve`."""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import signal
import traceback
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from socket import socket
from typing import TYPE_CHECKING

from flm_torchrec.cli.error_line import tell
from flm_torchrec.documents import Unreadable, read_text
from flm_torchrec.errors import FlmError, RunError

if TYPE_CHECKING:
    from flm_torchrec.serve.access import ApiKeys
    from flm_torchrec.serve.server import Certificate
    from flm_torchrec.serve.supervisor import Link, Swapped
    from flm_torchrec.serve.variants import Variants

LOOPBACK = ("127.0.0.1", "localhost", "::1")
MOST_KEY_BYTES = 1 << 20
SHARED_METRICS = "PROMETHEUS_MULTIPROC_DIR"
"""Variable that names prometheus_client the folder in which processes share their counts."""
KEYS = "FLM_SERVE_KEYS"
"""Variable of the environment that may have the lines of --keys."""
RANGES = {
    "port": (1, 65535),
    "workers": (1, 256),
    "threads": (1, 256),
    "waiting": (0, 100_000),
    "watch": (0, 86_400),
    "rate": (0, 1_000_000),
    "least_recall": (0, 1),
    "connections": (0, 1_000_000),
    "keep_days": (0.01, 36_500),
    "keep_events": (1, 10**12),
}
"""Bounds of numbers among the options."""


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
    _add_exports(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="(default: %(default)s)")
    parser.add_argument(
        "--allowed-hosts",
        default="",
        metavar="NAMES",
        help="host names that requests may ask for, with commas; '*.example.org' for all below one, '*' for any"
        " (default: localhost and the address listened on; listening on all, any IP address)",
    )
    parser.add_argument(
        "--workers", type=int, default=1, help="processes that share the port and the events (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=2, help="that work on requests (default: %(default)s)")
    parser.add_argument(
        "--waiting",
        type=int,
        default=128,
        help="requests that may wait for a thread; more get 503 (default: %(default)s)",
    )
    _add_access(parser)
    _add_store(parser)
    parser.set_defaults(run=run)


def _add_exports(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--export",
        required=True,
        type=Path,
        nargs="+",
        metavar="DIR",
        help="folder of 'flm export', or a link; several: each answers its share of the users",
    )
    parser.add_argument(
        "--split", metavar="PERCENTS", help="shares of several exports, such as 90/10 (default: equal ones)"
    )
    parser.add_argument(
        "--split-salt", default="", metavar="TEXT", help="another text draws other users for each share"
    )
    parser.add_argument(
        "--least-recall",
        type=float,
        default=0.9,
        help="recall@100 against brute force that an export needs to be swapped in; 0: any (default: %(default)s)",
    )
    parser.add_argument(
        "--watch",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="look so often whether --export, a link, points to another export, and swap (default: never)",
    )
    parser.add_argument(
        "--similar-users",
        action="store_true",
        help="answer /v1/users/similar, for those who have a key; takes 2 bytes a number of the users' vectors",
    )


def _add_access(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--keys",
        type=Path,
        metavar="FILE",
        help=f"API keys, lines of ROLE KEY [NAME], roles read, write, admin; or the lines in {KEYS}"
        " (default: none; everyone may read and write, admin routes are off)",
    )
    parser.add_argument(
        "--without-keys", action="store_true", help="trust everyone who can reach an address other than loopback"
    )
    parser.add_argument("--tls-certificate", type=Path, metavar="FILE", help="PEM, for HTTPS (default: HTTP)")
    parser.add_argument("--tls-key", type=Path, metavar="FILE", help="PEM, the key of --tls-certificate")
    parser.add_argument(
        "--rate",
        type=float,
        default=0.0,
        help="requests a second for each key, or each address without keys; more get 429 (default: any number)",
    )
    parser.add_argument(
        "--connections", type=int, default=0, help="at once; more are closed (default: as many as files may be open)"
    )

    parser.add_argument("--log-requests", action="store_true", help="print a line of JSON for each request")
    parser.add_argument(
        "--traces", metavar="URL", help="of an OpenTelemetry collector: a span for each request (default: none)"
    )


def _add_store(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--events",
        metavar="FILE",
        help="SQLite file that keeps live events and cold items, or postgresql://USER@HOST/DATABASE, which several"
        " machines share; 'none': in memory, lost at the end (default: beside --export, its name and .events.sqlite)",
    )
    parser.add_argument("--keep-days", type=float, default=90.0, help="that an event is kept (default: %(default)s)")
    parser.add_argument("--keep-events", type=int, default=10_000_000, help="events kept (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Serve an export until SIGTERM or Ctrl-C.

    Raises:
        RunError: an option, the address or the export is wrong.
    """
    _check(args)
    keys = _keys(args)
    tls = _certificate(args)
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
    if args.workers == 1:
        _serve(args, edge)
    else:
        _supervise(args, edge)


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
        _import_for_workers()

        def work(link: Link, swapped: Swapped) -> None:
            try:
                _serve(args, edge, WorkerStart(link, swapped, folder / EXPORTS))
            finally:
                if os.getppid() != supervisor:  # it was killed, so nobody else removes the folder
                    shutil.rmtree(folder, ignore_errors=True)

        ready = partial(print, f"{edge.url(args)} from {args.workers} processes", flush=True)
        code = Supervisor(work, fail, ready).run(args.workers)
    if code:
        raise SystemExit(code)


def _import_for_workers() -> None:
    """Import what workers run, so that forks share it in memory, and a crashed worker is back soon."""
    import pyarrow.dataset  # noqa: F401 (loading an export would import this and the next one, 100 MB of modules)
    import torch._functorch.aot_autograd  # noqa: F401

    from flm_torchrec.serve import app, server  # noqa: F401

    gc.collect()
    gc.freeze()  # the collector of a fork would write into the pages of all objects that it has from here


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
    from flm_torchrec.serve.server import serve
    from flm_torchrec.serve.tracing import collector

    served = _variants(args, worker)
    limits = ServerLimits(
        threads=args.threads,
        waiting=args.waiting,
        watch_seconds=args.watch,
        hosts=_hosts(args),
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
            print(f"{service.loaded.folder}: {sizes}{to}")
        started = partial(print, edge.url(args), flush=True)
    else:
        worker.link.follow(served.follow)
        started = partial(worker.link.tell, {"ready": True})
    serve(create_app(served, limits), edge.bound, connections, edge.tls, started)


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


def _keys(args: argparse.Namespace) -> ApiKeys:
    """The keys of `--keys` or of the environment.

    Raises:
        RunError: they cannot be read.
    """
    from flm_torchrec.serve.access import ApiKeys, read_keys

    if args.keys is not None:
        try:
            return read_keys(read_text(args.keys, MOST_KEY_BYTES), str(args.keys))
        except Unreadable as error:
            raise RunError(f"{args.keys}: not readable ({error}); --keys must name a text file") from error
    if os.environ.get(KEYS):
        return read_keys(os.environ[KEYS], KEYS)
    return ApiKeys()


def _certificate(args: argparse.Namespace) -> Certificate | None:
    """The certificate of the options; None without.

    Raises:
        RunError: only one of the two files is named, or they do not belong together.
    """
    if args.tls_certificate is None and args.tls_key is None:
        return None
    if args.tls_certificate is None or args.tls_key is None:
        raise RunError("--tls-certificate and --tls-key: give both, or neither")
    from flm_torchrec.serve.server import Certificate

    tls = Certificate(args.tls_certificate, args.tls_key)
    tls.check()
    return tls


def _hosts(args: argparse.Namespace) -> tuple[str, ...]:
    """The names of `--allowed-hosts`, or by default those that no other site can resolve to this server."""
    if args.allowed_hosts:
        return tuple(filter(None, (name.strip() for name in args.allowed_hosts.split(","))))
    everywhere = args.host in ("0.0.0.0", "::", "")
    return "localhost", "127.0.0.1", "::1", "address" if everywhere else args.host


def store_address(args: argparse.Namespace) -> str | None:
    """The store of `--events`; by default a file beside the first export, by its name, so that a link keeps it."""
    if args.events is not None:
        return None if args.events == "none" else str(args.events)
    export = Path(os.path.abspath(args.export[0]))
    return str(export.with_name(f"{export.name}.events.sqlite"))


def _check(args: argparse.Namespace) -> None:
    """Raise RunError where an option is out of its range, or does not fit another one."""
    for name, (least, most) in RANGES.items():
        if not least <= getattr(args, name) <= most:
            raise RunError(f"--{name.replace('_', '-')} {getattr(args, name)}: give {least} … {most}")
    from flm_torchrec.serve.split import check_names, read_split

    check_names(args.export)
    read_split(args.split, len(args.export))
    if args.traces is not None:
        from flm_torchrec.serve.tracing import check_traces

        check_traces(args.traces)
    if args.workers > 1 and args.events == "none":
        raise RunError(f"--workers {args.workers}: processes share events in a store; give --events FILE")
