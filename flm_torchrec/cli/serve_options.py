"""Options of `flm serve`, and what they mean: keys, a certificate, host names, and where events are kept."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from flm_torchrec.documents import Unreadable, read_text
from flm_torchrec.errors import RunError

if TYPE_CHECKING:
    from flm_torchrec.serve.access import ApiKeys
    from flm_torchrec.serve.server import Certificate

MOST_KEY_BYTES = 1 << 20
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


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add all options of `flm serve`."""
    _add_exports(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="(default: %(default)s)")
    parser.add_argument(
        "--allowed-hosts",
        default="",
        metavar="NAMES",
        help="host names that requests may ask for, with commas; '*.example.org' for all below one, 'address' for any"
        " IP address, '*' for any (default: localhost and the address listened on; listening on all, any IP address)",
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
        "--compile",
        action="store_true",
        help="compile the user tower for this machine before the start, unless that was done; takes about a minute"
        " (default: use it if it is compiled, else the portable program)",
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
        help="SQLite file that keeps live events and cold items, or postgresql://USER@HOST/DATABASE or"
        " redis://HOST:PORT/NUMBER, which several machines share; 'none': in memory, lost at the end"
        " (default: beside --export, its name and .events.sqlite)",
    )
    parser.add_argument("--keep-days", type=float, default=90.0, help="that an event is kept (default: %(default)s)")
    parser.add_argument("--keep-events", type=int, default=10_000_000, help="events kept (default: %(default)s)")


def api_keys(args: argparse.Namespace) -> ApiKeys:
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


def certificate(args: argparse.Namespace) -> Certificate | None:
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


def allowed_hosts(args: argparse.Namespace) -> tuple[str, ...]:
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


def check(args: argparse.Namespace) -> None:
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
