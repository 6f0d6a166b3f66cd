"""A stand-in of OpenSearch's REST API, for the requests that the store makes; what it does not know it refuses.

It checks what the documentation says of each request: method, parameters, fields of bodies, and what a mapping allows.
Documents are found by count and search after a refresh, by _mget at once. Its k-NN search is exact.
"""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import numpy as np

ROUTES: dict[tuple[str, str], set[str]] = {
    ("GET", "_mapping"): set(),
    ("PUT", ""): set(),
    ("POST", "_bulk"): set(),
    ("POST", "_mget"): {"_source"},
    ("POST", "_refresh"): set(),
    ("POST", "_forcemerge"): {"only_expunge_deletes"},
    ("POST", "_count"): set(),
    ("POST", "_search"): set(),
}
"""Method and endpoint of an index → parameters."""


class Refusal(Exception):
    """Status and reason of an answer that is an error."""


class OpenSearchStandIn:
    """A server on a free port. Use it as a context."""

    def __init__(self) -> None:
        self.indices: dict[str, dict[str, Any]] = {}
        """By name: settings and mappings."""
        self.aliases: dict[str, list[str]] = {}
        self.written: dict[str, dict[str, Any]] = {}
        """By index, the documents by id."""
        self.seen: dict[str, dict[str, Any]] = {}
        """The same as of the last refresh."""
        self.refused: list[str] = []
        """Requests that OpenSearch does not have."""
        self.full = False
        """Whether every document is refused."""
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))

    @property
    def to(self) -> str:
        """For `flm load --to`."""
        return f"opensearch:http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> OpenSearchStandIn:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, method: str, target: str, body: bytes) -> Any:
        """The answer to a request.

        Raises:
            Refusal: it is an error.
        """
        parts = urlsplit(target)
        index, _, endpoint = unquote(parts.path).strip("/").partition("/")
        known = ROUTES.get((method, endpoint))
        if known is None or not {name for name, _ in parse_qsl(parts.query)} <= known:
            self.refused.append(f"{method} {target}")
            raise Refusal(400, "no such request")
        if (method, endpoint) == ("PUT", ""):
            return self.put(index, json.loads(body))
        indices = self.aliases.get(index, [index])
        if any(one not in self.indices for one in indices):
            raise Refusal(404, f"no such index [{index}]")
        if endpoint == "_mapping":
            return {one: {"mappings": self.indices[one]["mappings"]} for one in indices}
        (index,) = indices
        return getattr(self, endpoint.removeprefix("_"))(index, body)

    def put(self, index: str, body: dict[str, Any]) -> Any:
        if index in self.indices or index in self.aliases:
            raise Refusal(400, f"index [{index}] already exists")
        if index != index.lower() or index.startswith(("_", "-", "+")):
            raise Refusal(400, f"Invalid index name [{index}]")
        assert set(body) == {"settings", "mappings"} and body["settings"] == {"index": {"knn": True}}
        vector = body["mappings"]["properties"]["embedding"]
        assert set(vector) == {"type", "dimension", "method"} and vector["type"] == "knn_vector"
        assert set(vector["method"]) == {"name", "engine", "space_type"} and 0 < vector["dimension"] <= 16_000
        self.indices[index] = body
        return {"acknowledged": True, "shards_acknowledged": True, "index": index}

    def bulk(self, index: str, body: bytes) -> Any:
        assert body.endswith(b"\n")
        lines = iter([json.loads(line) for line in body.splitlines()])
        answers = []
        for action in lines:
            ((kind, meta),) = action.items()
            assert set(meta) <= {"_id", "_index"} and kind in ("index", "delete")
            source = next(lines) if kind == "index" else None
            answers.append({kind: {"_index": index, "_id": meta["_id"], **self.change(index, meta["_id"], source)}})
        errors = any(one["status"] >= 300 for answer in answers for one in answer.values())
        return {"took": 1, "errors": errors, "items": answers}

    def change(self, index: str, key: str, source: dict[str, Any] | None) -> dict[str, Any]:
        documents = self.written.setdefault(index, {})
        if source is None:
            return {"status": 200 if documents.pop(key, None) else 404}
        if self.full:
            return {"status": 403, "error": {"type": "cluster_block", "reason": "disk usage exceeded flood-stage"}}
        assert 0 < len(key.encode()) <= 512
        vector = self.indices[index]["mappings"]["properties"]["embedding"]
        if len(source["embedding"]) != vector["dimension"]:
            return {"status": 400, "error": {"type": "mapper_parsing_exception", "reason": "Vector dimension mismatch"}}
        documents[key] = source
        return {"status": 201}

    def mget(self, index: str, body: bytes) -> Any:
        asked = json.loads(body)
        assert set(asked) == {"ids"} and asked["ids"]
        there = self.written.get(index, {})
        return {"docs": [{"_index": index, "_id": key, "found": key in there} for key in asked["ids"]]}

    def refresh(self, index: str, _: bytes) -> Any:
        self.seen[index] = dict(self.written.get(index, {}))
        return {"_shards": {"total": 1, "successful": 1, "failed": 0}}

    def forcemerge(self, index: str, _: bytes) -> Any:
        return {"_shards": {"total": 1, "successful": 1, "failed": 0}}

    def count(self, index: str, _: bytes) -> Any:
        return {"count": len(self.seen.get(index, {})), "_shards": {"total": 1, "successful": 1, "failed": 0}}

    def search(self, index: str, body: bytes) -> Any:
        asked = json.loads(body)
        assert set(asked) == {"size", "_source", "query"} and set(asked["query"]) == {"knn"}
        ((field, knn),) = asked["query"]["knn"].items()
        assert set(knn) == {"vector", "k"} and 0 < knn["k"] <= 10_000
        assert self.indices[index]["mappings"]["properties"][field]["method"]["space_type"] == "innerproduct"
        documents = self.seen.get(index, {})
        inner = np.array([document[field] for document in documents.values()]) @ np.array(knn["vector"])
        scores = np.where(inner > 0, inner + 1, 1 / (1 - np.minimum(inner, 0)))
        best = np.argsort(-scores, kind="stable")[: min(knn["k"], asked["size"])]
        keys = list(documents)
        return {"hits": {"hits": [{"_index": index, "_id": keys[i], "_score": float(scores[i])} for i in best]}}


def _handler(stand_in: OpenSearchStandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            try:
                status, answer = 200, stand_in.answer(self.command, self.path, body)
            except Refusal as refusal:
                status, reason = refusal.args
                answer = {"error": {"type": "exception", "reason": reason}, "status": status}
            except (AssertionError, KeyError, ValueError) as error:
                stand_in.refused.append(f"{self.command} {self.path}: {error!r}")
                status, answer = 400, {"error": {"type": "parsing_exception", "reason": repr(error)}, "status": 400}
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_PUT = do_DELETE = do_HEAD = do_GET

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing."""

    return Handler
