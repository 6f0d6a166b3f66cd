"""The HTTP side of `flm serve`: routes, limits, and errors as one line of JSON."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, Query, Request, Response
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel
from starlette.routing import Match, Route
from starlette.types import Scope

from flm_torchrec.safe_text import visible
from flm_torchrec.serve.access import Access, AccessGuard, ApiKeys
from flm_torchrec.serve.connections import report_accept_errors_once
from flm_torchrec.serve.description import described
from flm_torchrec.serve.hosts import KnownHosts
from flm_torchrec.serve.map import MapCache
from flm_torchrec.serve.messages import (
    Answered,
    EventAdded,
    Forget,
    Forgotten,
    FoundItem,
    FoundUsers,
    Health,
    ItemAdded,
    KnownEvent,
    NewEvent,
    NewItem,
    Recommend,
    RecommendBatch,
    Recommended,
    RecommendedBatch,
    ServedNames,
    Similar,
    SimilarUsers,
    Swap,
)
from flm_torchrec.serve.metrics import ServerMetrics
from flm_torchrec.serve.middleware import (
    MeasuringMiddleware,
    RequestRecords,
    add_error_handlers,
    json_bytes,
    parse,
    read_body,
)
from flm_torchrec.serve.quick import QuickRequests, QuickRoute, never, traced_elsewhere
from flm_torchrec.serve.resolve import Refused
from flm_torchrec.serve.service import Service
from flm_torchrec.serve.swapping import BUSY, NO_STORE, CanaryTerms
from flm_torchrec.serve.tracing import telemetry
from flm_torchrec.serve.variants import Variants
from flm_torchrec.serve.workers import Settle, Workers, one_thread

PAGE = Path(__file__).parent / "page"
M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True)
class ServerLimits:
    """Limits of requests and threads of a server."""

    body_bytes: int = 1_000_000
    """Maximum length of a request's body; a longer one gets 413."""
    body_seconds: float = 30.0
    """Seconds within which a request's body must come; a later one gets 408."""
    hosts: tuple[str, ...] = ("*",)
    """Host names that requests may name, see `hosts.KnownHosts`."""
    threads: int = 2
    """Threads that answer requests."""
    waiting: int = 128
    """Requests that may wait for a thread; further ones get 503."""
    keys: ApiKeys | None = None
    """API keys; None: everyone may read and write, and admin routes are off."""
    rate: float = 0.0
    """Requests a second for each key or address; 0: any number."""
    log_requests: bool = False
    """Whether each request prints a line of JSON."""
    traces: Any = None
    """Provider of tracers; None: the process's own, by default none."""
    watch_seconds: float = 0.0
    """Seconds between checks of where the export's link points to; 0: never."""


@dataclass(frozen=True)
class Operation:
    """A POST route that reads its body itself, which FastAPI does not see, as OpenAPI describes it."""

    path: str
    name: str
    answer: type[Answered]

    def add(self, app: FastAPI, message: type[BaseModel]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """The decorator that adds the route, whose body is a message."""
        content = {"application/json": {"schema": message.model_json_schema()}}
        told = described("POST", self.path, self.answer)
        told["openapi_extra"] |= {"requestBody": {"content": content, "required": True}}
        return app.post(self.path, operation_id=self.name, description=message.__doc__, **told)


class DirectRoute(Route):
    """A route that reads its body itself, and needs nothing of what FastAPI does for a route, which takes long."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """As of Starlette; the metrics find the route in the scope."""
        match, found = super().matches(scope)
        return match, {**found, "route": self}


def create_app(service: Service | Variants, limits: ServerLimits = ServerLimits()) -> FastAPI:
    """The HTTP app of a service, or of several: its routes, the web page and the metrics."""
    served = service if isinstance(service, Variants) else Variants.alone(service)
    workers, measures = Workers(served, limits.threads, limits.waiting), ServerMetrics(served)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        report_accept_errors_once(asyncio.get_running_loop())
        one_thread()
        tasks = [asyncio.create_task(_tend(one)) for one in served.services]
        if limits.watch_seconds:
            tasks += [asyncio.create_task(_watch(one, limits.watch_seconds)) for one in served.services]
        yield
        for task in tasks:
            task.cancel()
        workers.pool.shutdown()
        served.store.close()
        if limits.traces is not None:
            await asyncio.to_thread(limits.traces.shutdown)  # sends the last spans

    app = FastAPI(
        title="flm serve",
        telemetry=telemetry(limits.traces),
        lifespan=lifespan,
        docs_url=None,  # FastAPI's own page loads scripts from elsewhere
        redoc_url=None,
        generate_unique_id_function=lambda route: route.name,
    )
    add_error_handlers(app)
    access, records = Access(limits.keys or ApiKeys(), limits.rate), RequestRecords(measures, limits.log_requests)
    app.add_middleware(AccessGuard, access=access)
    app.add_middleware(KnownHosts, hosts=limits.hosts)
    app.add_middleware(MeasuringMiddleware, records=records)
    quick = QuickRequests(limits.hosts, access, records, limits.body_bytes)
    app.state.quick = None if limits.traces or traced_elsewhere() else quick
    _read_routes(app, served, workers, measures)
    _write_routes(app, served, workers, limits, quick)
    _admin_routes(app, served, limits)
    if (PAGE / "index.html").is_file():
        app.mount("/", StaticFiles(directory=PAGE, html=True))
    return app


def _read_routes(app: FastAPI, served: Variants, workers: Workers, measures: ServerMetrics) -> None:
    def get(path: str, answer: Any, parameters: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        return app.get(path, **described("GET", path, answer, parameters))

    @get("/health", Health)
    async def health() -> dict[str, Any]:
        """What is served."""
        return served.health()

    @app.get("/docs", include_in_schema=False)
    async def docs() -> FileResponse:
        return FileResponse(PAGE / "docs.html")

    @get("/livez", dict[str, str])
    async def live() -> dict[str, str]:
        """Whether the process runs."""
        return {"status": "ok"}

    @get("/readyz", dict[str, str])
    async def ready() -> dict[str, str]:
        """Whether the process can answer."""
        served.store.users()  # 503 where the store cannot be read
        return {"status": "ok"}

    @get("/metrics", None)
    async def metrics() -> Response:
        """Counts and times, as text for Prometheus."""
        return Response(measures.text(), media_type="text/plain; version=0.0.4")

    @get("/v1/catalogue", ServedNames)
    async def catalogue() -> dict[str, Any]:
        """The names that requests may use."""
        return await workers.do(served.first.vocabulary)

    @get("/v1/items", list[FoundItem], parameters=True)
    async def items(
        query: Annotated[str, Query(max_length=200)] = "", limit: Annotated[int, Query(ge=1, le=100)] = 20
    ) -> list[dict[str, Any]]:
        """Items whose title or key contains the text; those that were added come first."""
        return await workers.do(lambda: served.first.find_items(query, limit))

    @get("/v1/users", list[str], parameters=True)
    async def users(
        query: Annotated[str, Query(max_length=512)] = "", limit: Annotated[int, Query(ge=1, le=100)] = 20
    ) -> list[str]:
        """Keys of users that start with the text, then those that contain it."""
        return await workers.do(lambda: served.first.find_users(query, limit))

    @get("/v1/events", list[KnownEvent], parameters=True)
    async def events(user: Annotated[str, Query(min_length=1, max_length=512)]) -> list[dict[str, Any]]:
        """The last events of a user, exported and live, oldest first."""
        return await workers.do(lambda: served.of(user).events_of(user))

    maps = MapCache(served.first)

    @get("/v1/map", dict[str, Any])
    async def item_map() -> Response:
        """Where the items lie on the map of the page."""
        # Not in the threads that answer requests: making the map takes a second.
        return Response(await asyncio.to_thread(maps.get), media_type="application/json")


def _write_routes(app: FastAPI, served: Variants, workers: Workers, limits: ServerLimits, quick: QuickRequests) -> None:
    def post(
        operation: Operation,
        message: type[M],
        answer: Callable[[M], Awaitable[Any]],
        soon: Callable[[M, Settle], bool] = never,
    ) -> None:
        def read(body: bytes, state: dict[str, Any]) -> M:
            asked = parse(message, body)
            state["exports"] = served.names(asked)
            return asked

        async def route(request: Request) -> Response:
            body = await read_body(request, limits.body_bytes, limits.body_seconds)
            answered = await answer(read(body, request.scope["state"]))
            return Response(json_bytes(answered), media_type="application/json")

        operation.add(app, message)(route)  # for the description
        direct = DirectRoute(operation.path, route, methods=["POST"])
        app.router.routes.insert(0, direct)
        quick.add(QuickRoute(direct, read, answer, soon))

    def in_thread(answer: Callable[[M], Any]) -> Callable[[M], Awaitable[Any]]:
        return lambda asked: workers.do(lambda: answer(asked))

    async def batch(asked: RecommendBatch) -> dict[str, Any]:
        answers = await workers.do(lambda: served.recommend(asked.requests))
        for position, answer in enumerate(answers):
            if isinstance(answer, Refused):
                raise Refused(answer.status, f"requests.{position}: {answer}")
        return {"answers": answers}

    recommend = Operation("/v1/recommend", "recommend", Recommended)
    post(recommend, Recommend, workers.recommend, workers.recommend_soon)
    post(Operation("/v1/recommend/batch", "recommend_batch", RecommendedBatch), RecommendBatch, batch)
    post(
        Operation("/v1/similar", "similar", Recommended),
        Similar,
        lambda asked: workers.do(lambda: served.of(asked.unit).similar(asked)),
    )
    post(
        Operation("/v1/users/similar", "similar_users", FoundUsers),
        SimilarUsers,
        lambda asked: workers.do(lambda: served.of(asked.unit).similar_users(asked)),
    )
    post(
        Operation("/v1/items", "add_item", ItemAdded),
        NewItem,
        lambda item: workers.do(lambda: served.first.add_item(item)),
    )
    post(Operation("/v1/events", "add_event", EventAdded), NewEvent, workers.add_event)


def _admin_routes(app: FastAPI, served: Variants, limits: ServerLimits) -> None:
    @Operation("/v1/swap", "swap", Health).add(app, Swap)
    async def swap(request: Request) -> dict[str, Any]:
        asked = parse(Swap, await read_body(request, limits.body_bytes, limits.body_seconds))
        request.state.audit = asked.model_dump(exclude_unset=True)
        terms = None if asked.canary is None else CanaryTerms(asked.canary, time.time() + 60 * asked.minutes)
        service = served.named(asked.replaces)
        health = await asyncio.to_thread(service.swap, Path(asked.export), terms)  # requests do not wait for it
        return {**health, "exports": served.exports()}

    @Operation("/v1/forget", "forget", Forgotten).add(app, Forget)
    async def forget(request: Request) -> dict[str, Any]:
        asked = parse(Forget, await read_body(request, limits.body_bytes, limits.body_seconds))
        request.state.audit = {"users": len(asked.users), "check": asked.check}  # never who
        return await asyncio.to_thread(served.forget, asked)


async def _tend(service: Service) -> None:
    """Let a canary take over, or roll it back, when it is time."""
    while True:
        await asyncio.sleep(1.0)
        if service.canary is not None:
            await asyncio.to_thread(service.swaps.tend)


async def _watch(service: Service, seconds: float) -> None:
    """Swap when the export's link points elsewhere than before, and say so. What cannot be served is reported once.

    While the store cannot be read, or another export is being loaded, it is tried again.
    """
    seen = service.loaded.folder
    while True:
        await asyncio.sleep(seconds)
        target = service.export.resolve()
        if target == seen:
            continue
        if target == service.loaded.folder:  # another process has seen it first
            seen = target
            continue
        try:
            now = await asyncio.to_thread(service.swap, target)
            sizes = f"{now['items']} items, {now['users']} users; model {now['model_version']}"
            print(visible(f"swapped: {target}: {sizes}"), flush=True)
        except Refused as error:
            if error.status in (BUSY, NO_STORE):
                continue
            print(f"not swapped: {visible(str(error))}", flush=True)
        seen = target
