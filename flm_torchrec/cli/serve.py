"""`flm serve`."""

from __future__ import annotations

import argparse
import os
import signal
from functools import partial
from pathlib import Path

from flm_torchrec.errors import RunError

GRACE = 10
"""Seconds that running requests have to end after SIGTERM."""
RANGES = {
    "port": (1, 65535),
    "threads": (1, 256),
    "waiting": (0, 100_000),
    "watch": (0, 86_400),
    "keep_days": (0.01, 36_500),
    "keep_events": (1, 10**12),
}
"""Bounds of numbers among the options."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `serve` to the subcommands."""
    parser = subparsers.add_parser(
        "serve",
        help="answer over HTTP from an export, with a web page",
        description="Answer over HTTP from an export made with its user tower: recommendations for known and cold"
        " users, from histories and features; new items, new events and new exports are taken up while it runs.",
        allow_abbrev=False,
    )
    parser.add_argument("--export", required=True, type=Path, metavar="DIR", help="folder of 'flm export', or a link")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="(default: %(default)s)")
    parser.add_argument(
        "--allowed-hosts",
        default="",
        metavar="NAMES",
        help="host names that requests may ask for, with commas; '*.example.org' for all below one, '*' for any"
        " (default: localhost and the address listened on; listening on all, any IP address)",
    )
    parser.add_argument("--threads", type=int, default=2, help="that work on requests (default: %(default)s)")
    parser.add_argument(
        "--waiting",
        type=int,
        default=128,
        help="requests that may wait for a thread; more get 503 (default: %(default)s)",
    )
    parser.add_argument(
        "--watch",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="look so often whether --export, a link, points to another export, and swap (default: never)",
    )
    _add_store(parser)
    parser.set_defaults(run=run)


def _add_store(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--events",
        metavar="FILE",
        help="SQLite file that keeps live events and cold items; 'none': in memory, lost at the end"
        " (default: beside --export, its name and .events.sqlite)",
    )
    parser.add_argument("--keep-days", type=float, default=90.0, help="that an event is kept (default: %(default)s)")
    parser.add_argument("--keep-events", type=int, default=10_000_000, help="events kept (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Serve an export until SIGTERM or Ctrl-C.

    Raises:
        RunError: an option, the address or the export is wrong.
    """
    _check(args)
    # Imported here: PyTorch takes seconds, and a wrong option should be reported at once.
    import uvicorn

    from flm_torchrec.export.manifest import read_manifest
    from flm_torchrec.serve.app import ServerLimits, create_app
    from flm_torchrec.serve.connections import BACKLOG, GuardedProtocol, listening, most_connections
    from flm_torchrec.serve.event_store import EventStore, StoreLimits
    from flm_torchrec.serve.service import Service

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(
            number, _stop
        )  # uvicorn has its own handler while it serves, and raises the signal again afterwards
    bound, most = listening(args.host, args.port), most_connections()
    read_manifest(args.export)  # no store is made beside what is no export
    service = Service(
        args.export, EventStore(store_file(args), StoreLimits(days=args.keep_days, events=args.keep_events))
    )
    limits = ServerLimits(threads=args.threads, waiting=args.waiting, watch_seconds=args.watch, hosts=_hosts(args))
    folder, manifest = service.loaded.folder, service.loaded.manifest
    print(f"{folder}: {manifest.items} items, {manifest.users} users; model {manifest.model_version}")
    print(f"http://{args.host}:{args.port}", flush=True)
    config = uvicorn.Config(
        create_app(service, limits),
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=GRACE,
        http=partial(GuardedProtocol, most=most),  # type: ignore[arg-type]
        ws="none",
        backlog=BACKLOG,
    )
    uvicorn.Server(config).run(sockets=[bound])


def _stop(number: int, frame: object) -> None:
    """Exit with code 0: a stop on request is no error."""
    raise SystemExit(0)


def _hosts(args: argparse.Namespace) -> tuple[str, ...]:
    """The names of `--allowed-hosts`, or by default those that no other site can resolve to this server."""
    if args.allowed_hosts:
        return tuple(filter(None, (name.strip() for name in args.allowed_hosts.split(","))))
    everywhere = args.host in ("0.0.0.0", "::", "")
    return "localhost", "127.0.0.1", "::1", "address" if everywhere else args.host


def store_file(args: argparse.Namespace) -> Path | None:
    """The file of `--events`; by default beside the export, by the name given, so that a link keeps its events."""
    if args.events is not None:
        return None if args.events == "none" else Path(args.events)
    export = Path(os.path.abspath(args.export))
    return export.with_name(f"{export.name}.events.sqlite")


def _check(args: argparse.Namespace) -> None:
    """Raise RunError where a number is out of its range."""
    for name, (least, most) in RANGES.items():
        if not least <= getattr(args, name) <= most:
            raise RunError(f"--{name.replace('_', '-')} {getattr(args, name)}: give {least} … {most}")
