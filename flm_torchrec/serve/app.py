"""The HTTP side of `flm serve`: routes, limits, and errors as one line of JSON."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import faiss
import torch
from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

from flm_torchrec.serve.measures import Measures
from flm_torchrec.serve.messages import NewEvent, NewItem, Recommend, RecommendBatch, Swap
from flm_torchrec.serve.service import Refused, Service

PAGE = Path(__file__).parent / "page"
HEADERS = {
    "Content-Security-Policy": "default-src 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
M = TypeVar("M", bound=BaseModel)
Result = TypeVar("Result")


@dataclass(frozen=True)
class Load:
    """How much a server takes on."""

    body_bytes: int = 1_000_000
    """Of a request; more gets 413."""
    threads: int = 2
    """That work on requests at once."""
    waiting: int = 128
    """Requests that may wait for a thread; more get 503."""
    watch_seconds: float = 0.0
    """Between looks at where the export's link points to; 0: never."""


class Workers:
    """A few threads with a bounded queue before them."""

    def __init__(self, load: Load) -> None:
        self.pool = ThreadPoolExecutor(load.threads, thread_name_prefix="flm", initializer=_one_thread)
        self.most = load.threads + load.waiting
        self.running = 0

    async def do(self, work: Callable[[], Result]) -> Result:
        """In a thread.

        Raises:
            Refused: too many wait already.
        """
        if self.running >= self.most:
            raise Refused(503, f"overloaded: {self.most} requests are under way; try again in a second")
        self.running += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self.pool, work)
        finally:
            self.running -= 1


def _one_thread() -> None:
    """Requests run side by side; more threads inside one would only wait for each other."""
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)


def create_app(service: Service, load: Load = Load()) -> FastAPI:
    """The app of one service."""
    workers, measures = Workers(load), Measures(service)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        watcher = asyncio.create_task(_watch(service, load.watch_seconds)) if load.watch_seconds else None
        yield
        if watcher is not None:
            watcher.cancel()
        workers.pool.shutdown()

    app = FastAPI(title="flm serve", lifespan=lifespan, docs_url=None, redoc_url=None)
    _tell_errors(app)
    _measure(app, measures)
    _read_routes(app, service, workers, measures)
    _write_routes(app, service, workers, load)
    if (PAGE / "index.html").is_file():
        app.mount("/", StaticFiles(directory=PAGE, html=True))
    return app


def _read_routes(app: FastAPI, service: Service, workers: Workers, measures: Measures) -> None:
    @app.get("/health")
    async def health() -> dict[str, Any]:
        return service.health()

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(measures.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/catalogue")
    async def catalogue() -> dict[str, Any]:
        return await workers.do(service.catalogue)

    @app.get("/v1/items")
    async def items(
        query: Annotated[str, Query(max_length=200)] = "", limit: Annotated[int, Query(ge=1, le=100)] = 20
    ) -> list[dict[str, Any]]:
        return await workers.do(lambda: service.find_items(query, limit))


def _write_routes(app: FastAPI, service: Service, workers: Workers, load: Load) -> None:
    def post(path: str, message: type[M], answer: Callable[[M], Any]) -> None:
        async def route(request: Request) -> Any:
            asked = parse(message, await read_body(request, load.body_bytes))
            return JSONResponse(await workers.do(partial(answer, asked)))

        app.post(path, openapi_extra=_takes(message))(route)

    post("/v1/recommend", Recommend, lambda r: service.recommend([r])[0])
    post("/v1/recommend/batch", RecommendBatch, lambda b: {"answers": service.recommend(b.requests)})
    post("/v1/items", NewItem, service.add_item)
    post("/v1/events", NewEvent, service.add_event)

    @app.post("/v1/swap", openapi_extra=_takes(Swap))
    async def swap(request: Request) -> dict[str, Any]:
        asked = parse(Swap, await read_body(request, load.body_bytes))
        return await asyncio.to_thread(service.swap, Path(asked.export))  # loading must not keep requests waiting


def _takes(message: type[BaseModel]) -> dict[str, Any]:
    """For the description of the interface, which cannot see what a route reads by itself."""
    schema = {"content": {"application/json": {"schema": message.model_json_schema()}}, "required": True}
    return {"requestBody": schema}


async def read_body(request: Request, most: int) -> bytes:
    """The body of a request of JSON.

    Raises:
        Refused: it says to be something else, or is longer than `most` bytes, of which no more are read.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refused(415, "Content-Type: send application/json")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most:
            raise Refused(413, f"body: more than {most} bytes; ask for less at once")
    return bytes(body)


def parse(message: type[M], body: bytes) -> M:
    """JSON → a checked message.

    Raises:
        Refused: it is no JSON, or not such a message.
    """
    try:
        return message.model_validate_json(body)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise Refused(400 if problem["type"] == "json_invalid" else 422, _line(problem)) from error


def _line(problem: Any) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    return _printable(f"{where}: {problem['msg']}" if where else problem["msg"])


def _printable(text: str) -> str:
    """As UTF-8 can hold it: what came in may be half a character."""
    return text.encode("utf-8", "replace").decode("utf-8")[:500]


def _tell_errors(app: FastAPI) -> None:
    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> JSONResponse:
        headers = {"Retry-After": "1"} if error.status == 503 else None
        return JSONResponse({"detail": _printable(str(error))}, error.status, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse({"detail": _line(error.errors()[0])}, 422)

    @app.exception_handler(HTTPException)
    async def other(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"detail": _printable(str(error.detail))}, error.status_code, error.headers)


def _measure(app: FastAPI, measures: Measures) -> None:
    @app.middleware("http")
    async def measure(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
        start, status = time.perf_counter(), 500
        try:
            response = await answer(request)
            status = response.status_code
            response.headers.update(HEADERS)
            return response
        finally:
            found = request.scope.get("route")
            route = getattr(found, "path", "other")
            measures.requests.labels(route, status).inc()
            measures.seconds.labels(route).observe(time.perf_counter() - start)


async def _watch(service: Service, seconds: float) -> None:
    """Swap when the export's link points elsewhere than before; what cannot be served is left, and told once."""
    seen = service.generation.folder
    while True:
        await asyncio.sleep(seconds)
        target = service.export.resolve()
        if target == seen:
            continue
        seen = target
        try:
            await asyncio.to_thread(service.swap, target)
        except Refused as error:
            print(f"not swapped: {error}", flush=True)
