"""`flm serve`."""

from __future__ import annotations

import argparse
import signal
from functools import partial
from pathlib import Path

from flm_torchrec.errors import RunError

GRACE = 10
"""Seconds that running requests have to end after SIGTERM."""


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
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Serve an export until SIGTERM or Ctrl-C.

    Raises:
        RunError: an option, the address or the export is wrong.
    """
    _check(args)
    # Imported here: PyTorch takes seconds, and a wrong option should be reported at once.
    import uvicorn

    from flm_torchrec.serve.app import ServerLimits, create_app
    from flm_torchrec.serve.connections import BACKLOG, GuardedProtocol, listening, most_connections
    from flm_torchrec.serve.service import Service

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(
            number, _stop
        )  # uvicorn has its own handler while it serves, and raises the signal again afterwards
    bound, most = listening(args.host, args.port), most_connections()
    service = Service(args.export)
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


def _check(args: argparse.Namespace) -> None:
    """Raise RunError where a number is out of its range."""
    for name, least, most in (("port", 1, 65535), ("threads", 1, 256), ("waiting", 0, 100_000), ("watch", 0, 86_400)):
        if not least <= getattr(args, name) <= most:
            raise RunError(f"--{name} {getattr(args, name)}: give {least} … {most}")
