"""Who may ask for what: API keys with roles, a limit of requests for each client, and a record of admin acts."""

from __future__ import annotations

import hashlib
import hmac
import json
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flm_torchrec.errors import RunError
from flm_torchrec.names import nearest
from flm_torchrec.safe_text import visible

Role = Literal["read", "write", "admin"]
ROLES: tuple[Role, ...] = get_args(Role)
"""Each role may do what the ones before it may."""
ADMIN = ("/v1/swap", "/v1/forget")
"""Routes of admins. Without an admin key they are off."""
READING = ("/v1/recommend", "/v1/recommend/batch", "/v1/similar", "/v1/users/similar")
"""Routes that are POST because they take a body, and change nothing."""
KEYED = ("/v1/users/similar",)
"""Routes that are off while there are no keys: they tell of one person from what others did."""
GUARDED = ("/v1/", "/metrics")
"""Beginnings of paths that need a key. The pages, the description and the probes need none: they show no data."""
SHORTEST = 16
"""Minimum length of a key: `openssl rand -hex 16` makes one of 32."""
CLIENTS = 10_000
"""Clients whose requests are counted at once; those silent for longest are forgotten."""
WRONG_KEYS = 5.0
"""Requests with a wrong key that one address may send in a second."""


@dataclass(frozen=True)
class ApiKey:
    """A key, of which only the digest is kept."""

    role: Role
    digest: bytes
    name: str


class ApiKeys:
    """The keys of a server."""

    def __init__(self, keys: Sequence[ApiKey] = ()) -> None:
        self.keys = tuple(keys)

    def __bool__(self) -> bool:
        return bool(self.keys)

    def find(self, given: str) -> ApiKey | None:
        """The key with this text. All keys are compared, each in constant time."""
        digest = hashlib.sha256(given.encode("utf-8", "surrogateescape")).digest()
        found = None
        for key in self.keys:
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found


def read_keys(text: str, where: str) -> ApiKeys:
    """Keys from lines of `ROLE KEY [NAME]`; empty lines and lines that begin with # are left out.

    Args:
        where: what the text was read from, for errors; these never show a key.

    Raises:
        RunError: a line is something else, a key is too short or comes twice, or there is none.
    """
    keys: list[ApiKey] = []
    for number, line in enumerate(text.splitlines(), 1):
        parts = line.split()
        if not parts or parts[0].startswith("#"):
            continue
        if len(parts) not in (2, 3):
            raise RunError(f"{where}: line {number}: has {len(parts)} words; write ROLE KEY or ROLE KEY NAME")
        if parts[0] not in ROLES:
            raise RunError(f"{where}: line {number}: no role '{visible(parts[0])[:20]}'; {nearest(parts[0], ROLES)}")
        if len(parts[1]) < SHORTEST or not parts[1].isascii():
            raise RunError(
                f"{where}: line {number}: a key has at least {SHORTEST} ASCII letters; 'openssl rand -hex 16'"
            )
        digest = hashlib.sha256(parts[1].encode()).digest()
        name = parts[2] if len(parts) == 3 else f"key-{digest.hex()[:8]}"
        if any(key.digest == digest for key in keys):
            raise RunError(f"{where}: line {number}: the key of an earlier line; give each key one role")
        keys.append(ApiKey(ROLES[ROLES.index(parts[0])], digest, name))  # type: ignore[arg-type]
    if not keys:
        raise RunError(f"{where}: has no key; write lines of ROLE KEY, with roles {', '.join(ROLES)}")
    return ApiKeys(keys)


class Rates:
    """Requests that each client may send in a second: a bucket of as many, filled evenly (token bucket)."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.most = max(1.0, rate)
        self.left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, client: str) -> bool:
        """Count a request; False where the client has sent too many."""
        now = time.monotonic()
        before, at = self.left.pop(client, (self.most, now))
        left = min(self.most, before + (now - at) * self.rate)
        self.left[client] = (left - 1 if left >= 1 else left, now)
        if len(self.left) > CLIENTS:
            self.left.popitem(last=False)
        return left >= 1


def role_of(method: str, path: str) -> Role | None:
    """The role that a request needs; None where anyone may ask."""
    if path.rstrip("/") in ADMIN:
        return "admin"
    if not path.startswith(GUARDED):
        return None
    return "read" if method in ("GET", "HEAD", "OPTIONS") or path.rstrip("/") in READING else "write"


class Access:
    """The rules of who may ask for what.

    Args:
        keys: none: everyone may read and write, and admin routes are off.
        rate: requests a second for each key, or each address where no key is given; 0: any number.
    """

    def __init__(self, keys: ApiKeys, rate: float) -> None:
        self.keys = keys
        self.rates = Rates(rate) if rate else None
        self.wrong = Rates(WRONG_KEYS)

    def admits(self, scope: Scope) -> bool:
        """Whether a request is answered; then it counts for its client's rate. Where it is not, `refusal` says why."""
        key = self.keys.find(given_key(scope))
        needed = role_of(scope["method"], scope["path"])
        if needed is None:
            return True
        if (self.keys and key is None) or self._forbidden(scope["path"], needed, key):
            return False
        return self._within_rate(scope, key)

    def refusal(self, scope: Scope, key: ApiKey | None) -> JSONResponse | None:
        """The answer to a request that is refused; None: it is not, and counts for its client's rate."""
        needed = role_of(scope["method"], scope["path"])
        if needed is None:
            return None
        if self.keys and key is None:
            if not self.wrong.take(address_of(scope)):
                return _answer(429, "key: too many requests without the right one; wait a second")
            return _answer(401, "key: none, or a wrong one; send 'Authorization: Bearer KEY'")
        forbidden = self._forbidden(scope["path"], needed, key)
        if forbidden:
            return _answer(403, forbidden)
        if self.rates and not self._within_rate(scope, key):
            return _answer(429, f"rate: more than {self.rates.rate:g} requests a second; wait a second")
        return None

    def _forbidden(self, path: str, needed: Role, key: ApiKey | None) -> str:
        """Why a key, or a request without one where there are no keys, is not enough; empty: it is."""
        if needed == "admin" and not any(k.role == "admin" for k in self.keys.keys):
            return f"{path}: is off; start the server with an admin key (--keys) to use it"
        if not self.keys and path.rstrip("/") in KEYED:
            return f"{path}: is off; start the server with keys (--keys) to use it"
        if key is not None and ROLES.index(key.role) < ROLES.index(needed):
            return f"key: is for {key.role}, this needs one for {needed}"
        return ""

    def _within_rate(self, scope: Scope, key: ApiKey | None) -> bool:
        return self.rates is None or self.rates.take(key.name if key else address_of(scope))


class AccessGuard:
    """Refuses requests without the key that they need, and clients that send too many. Records admin acts."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self.app = app
        self.access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        key = self.access.keys.find(given_key(scope))
        refusal = self.access.refusal(scope, key)
        if role_of(scope["method"], scope["path"]) == "admin":
            send = _recorded(scope, send, key)
        await (refusal or self.app)(scope, receive, send)


def address_of(scope: Scope) -> str:
    """The address that a request came from; empty of a socket without addresses."""
    return scope["client"][0] if scope.get("client") else ""


def now() -> str:
    """The time for a line of a log."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def given_key(scope: Scope) -> str:
    """The key of a request, from `Authorization: Bearer KEY` or `X-API-Key: KEY`."""
    headers = Headers(scope=scope)
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "").strip()


def _answer(status: int, detail: str) -> JSONResponse:
    extra = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}
    return JSONResponse({"detail": detail}, status, extra.get(status))


def _recorded(scope: Scope, send: Send, key: ApiKey | None) -> Send:
    """`send` that also prints a line about an admin act, done or refused, once its status is known."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            line = {
                "audit": f"{scope['method']} {scope['path']}",
                "request": scope.get("state", {}).get("request_id"),
                "time": now(),
                "key": key.name if key else None,
                "address": address_of(scope),
                "status": message["status"],
                **scope.get("state", {}).get("audit", {}),
            }
            print(visible(json.dumps(line, ensure_ascii=False)), flush=True)
        await send(message)

    return sending
