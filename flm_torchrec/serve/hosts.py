"""Host names that `flm serve` answers to."""

from __future__ import annotations

from collections.abc import Collection
from ipaddress import ip_address

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from flm_torchrec.safe_text import visible


class KnownHosts:
    """Refuses requests for other host names: a web page could have its own name resolve to this server's address.

    Args:
        hosts: names and addresses without ports. "*" is any name, "*.example.org" any name below it, and "address" any
            IP address, which nobody can register as a name.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str]) -> None:
        self.app = app
        self.hosts = host_names(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("host", "")
        if self._known(given):
            await self.app(scope, receive, send)
            return
        detail = f"Host: '{visible(given)[:100]}' is not served here; name it with --allowed-hosts"
        await JSONResponse({"detail": detail}, 400)(scope, receive, send)

    def _known(self, given: str) -> bool:
        return is_known(given, self.hosts)


def host_names(hosts: Collection[str]) -> frozenset[str]:
    """Names as `is_known` compares them."""
    return frozenset(host.lower().strip("[]") for host in hosts)


def is_known(given: str, hosts: Collection[str]) -> bool:
    """Whether a Host header names one of the `host_names`."""
    name = host_name(given)
    if "*" in hosts or name in hosts:
        return True
    if any(host.startswith("*.") and name.endswith(host[1:]) for host in hosts):
        return True
    return "address" in hosts and _is_address(name)


def host_name(given: str) -> str:
    """The host of a Host header, without its port and brackets: `[::1]:8000` → `::1`."""
    name = given.strip().lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.partition(":")[0].removesuffix(".")


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True
