"""The readers of YAML and JSON. They limit size, depth and expansion, and refuse equal keys.

A config, schema or manifest may come from an untrusted source. A few lines of YAML can expand to gigabytes (aliases of
aliases), a few kilobytes of brackets can exhaust the stack, and other readers silently drop one of two equal keys.
"""

from __future__ import annotations

import json
import reprlib
from pathlib import Path
from typing import Any

import yaml

MOST_DEPTH = 64
"""Maximum depth of nested mappings and lists. Files of this package have 6 levels."""
MOST_YAML_BYTES = 4 * 2**20
"""PyYAML reads about 100 KiB a second."""
MOST_JSON_BYTES = 256 * 2**20
"""A plan.json of 4,096 ranks and 200 row-wise tables has about 100 MiB."""
MOST_NODES = 200_000
"""Maximum of values in a YAML file with aliases ('*name'), with each alias expanded."""
MOST_DIGITS = 300
"""Maximum of digits of a number. More exceed float64, and Python parses long numbers in quadratic time."""
MOST_BITS = 1000
"""Maximum of bits of an integer, for the same reason."""


class Unreadable(ValueError):
    """A file or text cannot be read. The message says why, in one line; the caller adds the file and how to mend it."""


def read_yaml(file: Path) -> Any:
    """The content of a YAML file; None if it is empty.

    Raises:
        Unreadable: the file cannot be read, or is no YAML that `parse_yaml` takes.
    """
    return parse_yaml(read_text(file, MOST_YAML_BYTES))


def read_json(file: Path) -> Any:
    """The content of a JSON file.

    Raises:
        Unreadable: the file cannot be read, or is no JSON that `parse_json` takes.
    """
    return parse_json(read_text(file, MOST_JSON_BYTES))


def read_text(file: Path, most: int) -> str:
    """A text file in UTF-8, with or without a byte order mark, or in UTF-16 with one.

    Args:
        most: maximum size in bytes.

    Raises:
        Unreadable: the file does not exist, is larger, or has another encoding.
    """
    try:
        with file.open("rb") as stream:
            content = stream.read(most + 1)
    except OSError as error:
        raise Unreadable(error.strerror or str(error)) from error
    if len(content) > most:
        raise Unreadable(f"has more than {most:,} bytes, the most that is read of such a file")
    return decoded(content)


def decoded(content: bytes) -> str:
    """Decode bytes as `read_text` does.

    Raises:
        Unreadable: neither UTF-8 nor UTF-16 with a byte order mark.
    """
    utf16 = content.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        return content.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        encoding = "UTF-16" if utf16 else "UTF-8"
        raise Unreadable(f"not {encoding} at byte {error.start}; save it as UTF-8") from error


def parse_yaml(text: str) -> Any:
    """The content of a YAML text.

    Raises:
        Unreadable: not YAML, or with equal keys, too deep, too many repeated parts or too long a number.
    """
    try:
        content = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        raise Unreadable(f"not YAML{_place(error)}: {_line(error.problem or error.context or error)}") from error
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise Unreadable(f"not YAML: {_line(error)}") from error
    _refuse_huge(content)
    return content


def parse_json(text: str) -> Any:
    """The content of a JSON text.

    Raises:
        Unreadable: not JSON, or with equal keys, too deep, or with too long a number.
    """
    try:
        content = json.loads(text, object_pairs_hook=_without_equal_keys, parse_int=_integer)
    except json.JSONDecodeError as error:
        raise Unreadable(f"not JSON, perhaps cut short (line {error.lineno}: {error.msg})") from error
    except RecursionError as error:
        raise Unreadable(f"not JSON: nested more than {MOST_DEPTH} deep") from error
    _refuse_huge(content)
    return content


def shortened(value: Any) -> str:
    """A value as short text for a message, also if it is huge."""
    return _SHORT.repr(value)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


class _Loader(yaml.SafeLoader):
    """SafeLoader with limits on aliases, depth and numbers, which refuses equal keys."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = 0
        self.nodes = 0
        self.sizes: dict[int, int] = {}
        """Number of values in a composed node, with aliases expanded, by id of the node."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        alias = self.check_event(yaml.AliasEvent)
        mark = self.peek_event().start_mark
        before = self.nodes
        self.depth += 1
        if self.depth > MOST_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"nested more than {MOST_DEPTH} deep", problem_mark=mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        if alias and id(node) not in self.sizes:
            raise yaml.MarkedYAMLError(problem="a part that holds itself", problem_mark=mark)
        self.nodes += self.sizes[id(node)] if alias else 1
        if alias and self.nodes > MOST_NODES:
            problem = f"repeated parts ('*') expand to more than {MOST_NODES:,} values"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
        self.sizes.setdefault(id(node), self.nodes - before)
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode):
                continue
            if (key.tag, key.value) in seen:
                problem = f"the key {shortened(key.value)} is there twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)

    def construct_number(self, node: Any) -> Any:
        if len(node.value) > MOST_DIGITS:
            problem = f"a number of more than {MOST_DIGITS} digits"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        is_integer = node.tag.endswith(":int")
        return self.construct_yaml_int(node) if is_integer else self.construct_yaml_float(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_number)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_number)


def _without_equal_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise Unreadable(f"the key {shortened(twice)} is there twice")
    return mapping


def _integer(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise Unreadable(f"a number of more than {MOST_DIGITS} digits")
    return int(digits)


def _refuse_huge(content: Any) -> None:
    """Raise Unreadable for values nested too deep, or integers beyond float64."""
    level = [content]
    for _ in range(MOST_DEPTH + 1):
        if any(isinstance(value, int) and value.bit_length() > MOST_BITS for value in level):
            raise Unreadable(f"a whole number of more than {MOST_BITS} bits")
        level = [child for value in level for child in _children(value)]
        if not level:
            return
    raise Unreadable(f"nested more than {MOST_DEPTH} deep")


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value.values(), *value.keys()]
    return value if isinstance(value, list) else []


def _place(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    return f" at line {mark.line + 1}" if mark else ""


def _line(error: Any) -> str:
    return " ".join(str(error).split())[:200]
