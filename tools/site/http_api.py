"""The page of the HTTP API, from the OpenAPI document of `flm serve`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from typing import Any
from unittest.mock import MagicMock

from flm_torchrec.serve.app import create_app

JSON = "application/json"
RANGES = {
    "minimum": "≥ {}",
    "exclusiveMinimum": "> {}",
    "maximum": "≤ {}",
    "exclusiveMaximum": "< {}",
    "minLength": "at least {} characters",
    "maxLength": "at most {} characters",
    "minItems": "at least {} values",
    "maxItems": "at most {} values",
    "maxProperties": "at most {} names",
}
"""Limits of JSON Schema, in words."""
INTRODUCTION = """# HTTP API

Written from the OpenAPI document of the service, which a running server gives at `/openapi.json`.
[Serving](serving.md) explains the routes and shows requests; `flm_torchrec.client` is a typed client for Python
([Python API](api.md)).

Bodies and answers are JSON. **Key** is the role that a key must have where the server has keys (`--keys`): `admin` may
do what `write` may, `write` what `read` may. Without keys everyone may read and write, and routes of admins are off. A
key is sent as `Authorization: Bearer KEY` or `X-API-Key: KEY`.
"""


def document() -> dict[str, Any]:
    """The OpenAPI document. It is that of every export, so none is loaded."""
    return create_app(MagicMock()).openapi()


def http_page(described: Mapping[str, Any]) -> str:
    """The page: a table of all routes, each route with its parameters, bodies and errors, and the models."""
    operations = [
        (f"{method.upper()} {path}", operation)
        for path, methods in described["paths"].items()
        for method, operation in methods.items()
    ]
    rows = [(f"[{name}](#{anchor(name)})", operation["x-key"], first(operation)) for name, operation in operations]
    parts = [INTRODUCTION, table(("route", "key", ""), rows)]
    found: dict[str, Any] = {}
    for name, operation in operations:
        parts += route(name, operation)
        for schema in schemas(operation):
            found |= schema.get("$defs", {})
    parts += ["## Models", "The fields of what the tables above name."]
    for name, schema in sorted(found.items()):
        parts += [f"### {name} {{#{anchor(name)}}}", cell(schema.get("description", "")), fields(schema)]
    return "\n\n".join(parts)


def route(name: str, operation: Mapping[str, Any]) -> Iterator[str]:
    """The parts of the page about one route."""
    yield f"## {name} {{#{anchor(name)}}}"
    yield cell(operation.get("description", ""))
    yield f"Key: {operation['x-key']}. Name of the operation: `{operation['operationId']}`."
    if given := operation.get("parameters"):
        yield "**Parameters**"
        rows = [property_row(one["name"], one["schema"], bool(one.get("required"))) for one in given]
        yield table(("name", "type", "default", "meaning"), rows)
    if body := operation.get("requestBody"):
        yield "**Request**"
        yield fields(body["content"][JSON]["schema"])
    answer = operation["responses"]["200"].get("content", {}).get(JSON)
    yield "**Answer** (200)"
    yield fields(answer["schema"]) if answer and answer["schema"] else "Text."
    errors = [(status, cell(told["description"])) for status, told in operation["responses"].items() if status != "200"]
    if errors:
        yield '**Errors**: `{"detail": "one line"}` with a status'
        yield table(("status", "when"), sorted(errors))


def schemas(operation: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The schemas of the bodies of a route."""
    for one in (operation.get("requestBody"), operation["responses"]["200"]):
        if one and one.get("content", {}).get(JSON):
            yield one["content"][JSON]["schema"]


def fields(schema: Mapping[str, Any]) -> str:
    """The fields of an object as a table; of any other value its type."""
    if "properties" not in schema:
        return type_of(schema)[:1].upper() + type_of(schema)[1:] + "."
    required = schema.get("required", ())
    rows = [property_row(name, one, name in required) for name, one in schema["properties"].items()]
    return table(("field", "type", "default", "meaning"), rows)


def property_row(name: str, schema: Mapping[str, Any], required: bool) -> tuple[str, str, str, str]:
    """Name, type, default and meaning."""
    default = "required" if required else f"`{json.dumps(schema.get('default'))}`"
    return f"`{name}`", type_of(schema), default, cell(schema.get("description", ""))


def type_of(schema: Mapping[str, Any]) -> str:
    """A type of JSON Schema in words, with its limits and a link to a model."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{anchor(name)})"
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(type_of(one) for one in schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    kind = schema.get("type", "any value")
    if kind == "array":
        kind = f"list of {type_of(schema.get('items', {}))}"
    elif kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        kind = f"object, by name {type_of(schema['additionalProperties'])}"
    limits = [text.format(f"{Decimal(schema[name]).normalize():f}") for name, text in RANGES.items() if name in schema]
    return f"{kind} ({cell(', '.join(limits))})" if limits else kind


def anchor(name: str) -> str:
    """The place of a route or a model on the page."""
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    lines = [list(head), *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], ["---"] * len(lines[0]), *lines[1:]])


def first(operation: Mapping[str, Any]) -> str:
    """The first sentence about a route."""
    return cell(operation.get("description", "").partition("\n")[0])


def cell(text: str) -> str:
    """Text as one line of Markdown that means nothing but itself."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")
