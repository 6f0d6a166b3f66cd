"""What the OpenAPI document says of each route beside its path: the answer, the errors, the key."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

from flm_torchrec.serve.access import role_of

ERRORS = {
    400: "the body is no JSON",
    401: "no key, or a wrong one",
    403: "the key is for less, or the route is off",
    404: "the user is not known",
    408: "the body did not come in time",
    409: "not now: the item is in the catalogue or too many were added; another export is being loaded",
    413: "the body is too long",
    415: "the body is not application/json",
    422: "a field or a parameter is wrong; the line names it",
    429: "too many requests, or too many with a wrong key",
    503: "too many requests wait, or the store of events cannot be reached; try again after Retry-After seconds",
}
"""What a status means. The body of each is {"detail": one line}."""
OF_BODIES = (400, 408, 413, 415, 422)
OF_KEYS = (401, 403, 429)
UNKNOWN_USER = ("GET /v1/events", "POST /v1/recommend", "POST /v1/recommend/batch", "POST /v1/users/similar")
CONFLICT = ("POST /v1/items", "POST /v1/swap")
BUSY = ("/v1/", "/readyz")
"""Beginnings of paths whose routes wait for a thread or need the store."""


def described(method: str, path: str, answer: Any, parameters: bool = False) -> dict[str, Any]:
    """Arguments of FastAPI's decorator of a route: its answers by status, and the role that its key needs.

    Args:
        answer: type of the answer's JSON; None: it is no JSON.
        parameters: whether it has parameters, which may be wrong.
    """
    here, role = f"{method} {path}", role_of(method, path)
    statuses = [
        *(OF_BODIES if method == "POST" else (422,) if parameters else ()),
        *(OF_KEYS if role else ()),
        *((404,) if here in UNKNOWN_USER else ()),
        *((409,) if here in CONFLICT else ()),
        *((503,) if path.startswith(BUSY) else ()),
    ]
    responses: dict[int | str, dict[str, Any]] = {
        status: {"description": ERRORS[status]} for status in sorted(statuses)
    }
    if answer is not None:
        schema = TypeAdapter(answer).json_schema()
        responses[200] = {"description": "done", "content": {"application/json": {"schema": schema}}}
    return {"responses": responses, "response_model": None, "openapi_extra": {"x-key": role or "none"}}
