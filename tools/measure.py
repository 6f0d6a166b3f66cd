"""Measures of the source that the project holds itself to, one a line, with its bound. Exits 1 where one is exceeded.

python tools/measure.py                # the package, launch/ and tools/
python tools/measure.py --where        # also names each place that counts
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("flm_torchrec", "launch", "tools")
MOST_LINES, MOST_NESTING, MOST_PARAMETERS = 60, 3, 6
Function = ast.FunctionDef | ast.AsyncFunctionDef
BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.Try, ast.With, ast.AsyncWith, ast.Match)
NOT_COUNTED = ("self", "cls", "ctx")
"""First parameters of methods, `ctx` of those of `torch.autograd.Function`."""
KERNEL = "Triton takes each constant of a kernel as a parameter"
EXEMPT = {
    "launch/components.py pretrain": "torchx makes one option of each parameter, and reads them in the source",
    "flm_torchrec/model/attention_kernels.py queries_kernel": KERNEL,
    "flm_torchrec/model/attention_kernels.py items_kernel": KERNEL,
}
"""Functions whose parameters are not counted, each with its reason."""


@dataclass(frozen=True)
class SourceFile:
    """One file."""

    path: str
    """Relative to the checkout."""
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        """Its syntax tree; SyntaxError if the file is no Python."""
        return ast.parse(self.text, self.path)

    @cached_property
    def functions(self) -> list[tuple[Function, bool]]:
        """Every function, and whether it is public: no part of its name is private, and no function encloses it."""
        return list(_functions(self.tree, True))

    def place(self, node: Function | ast.ClassDef) -> str:
        """File, line and name of a definition."""
        return f"{self.path}:{node.lineno} {node.name}"


@dataclass(frozen=True)
class Measure:
    """What is counted, how many there may be, and where they are."""

    name: str
    most: int
    places: list[str]


def _functions(node: ast.AST, public: bool) -> Iterator[tuple[Function, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function):
            yield child, public and not child.name.startswith("_")
            yield from _functions(child, False)
        elif isinstance(child, ast.ClassDef):
            yield from _functions(child, public and not child.name.startswith("_"))
        else:
            yield from _functions(child, public)


def lines(function: Function) -> int:
    """Lines of a function, its signature and docstring included."""
    return (function.end_lineno or function.lineno) - function.lineno + 1


def nesting(node: ast.AST, depth: int = 0) -> int:
    """Blocks inside one another; `elif` is no deeper than its `if`, and a function inside counts for itself."""
    deepest = depth
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function | ast.ClassDef):
            continue
        chained = isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]
        deepest = max(deepest, nesting(child, depth + (isinstance(child, BLOCKS) and not chained)))
    return deepest


def parameters(function: Function) -> int:
    """Parameters of a function, without a first one that is the object, the class or the context of a method."""
    args = function.args
    names = [a.arg for a in (*args.posonlyargs, *args.args, *args.kwonlyargs)]
    return len(names) - (names[:1] != [] and names[0] in NOT_COUNTED)


def too_long(sources: Iterable[SourceFile]) -> list[str]:
    """Functions of more than 60 lines."""
    return [s.place(f) for s in sources for f, _ in s.functions if lines(f) > MOST_LINES]


def too_deep(sources: Iterable[SourceFile]) -> list[str]:
    """Functions with more than 3 blocks inside one another."""
    return [s.place(f) for s in sources for f, _ in s.functions if nesting(f) > MOST_NESTING]


def too_wide(sources: Iterable[SourceFile]) -> list[str]:
    """Functions with more than 6 parameters."""
    wide = [(s, f) for s in sources for f, _ in s.functions if parameters(f) > MOST_PARAMETERS]
    return [s.place(f) for s, f in wide if f"{s.path} {f.name}" not in EXEMPT]


def without_docstring(sources: Iterable[SourceFile]) -> list[str]:
    """Public functions and methods that say nothing of themselves."""
    return [s.place(f) for s in sources for f, public in s.functions if public and not ast.get_docstring(f)]


def not_formatted(sources: Iterable[SourceFile]) -> list[str]:
    """Lines that the formatter is told to leave as they are."""
    return [
        f"{source.path}:{number}"
        for source in sources
        for number, line in enumerate(source.text.splitlines(), 1)
        if line.rstrip().endswith("# fmt: skip")
    ]


def defined_twice(sources: Iterable[SourceFile]) -> list[str]:
    """Classes with the name of another one."""
    first: dict[str, str] = {}
    places = []
    for source in sources:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.ClassDef) and node.name in first:
                places.append(f"{source.place(node)}, as in {first[node.name]}")
            elif isinstance(node, ast.ClassDef):
                first[node.name] = f"{source.path}:{node.lineno}"
    return places


def config_fields(sources: Iterable[SourceFile]) -> list[str]:
    """Settings of a run: fields of the classes in config/schema.py; those of `Config` are sections."""
    classes = [
        node
        for source in sources
        if source.path == "flm_torchrec/config/schema.py"
        for node in source.tree.body
        if isinstance(node, ast.ClassDef) and node.name != "Config"
    ]
    return [f"{c.name}.{ast.unparse(f.target)}" for c in classes for f in c.body if isinstance(f, ast.AnnAssign)]


def import_circles(sources: Iterable[SourceFile]) -> list[str]:
    """Modules that import themselves, through others, when they are loaded."""
    trees = {s.path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): s.tree for s in sources}
    imports = {module: _imported(tree, set(trees)) for module, tree in trees.items()}
    return [module for module in imports if module in _reachable(module, imports)]


def _imported(tree: ast.Module, modules: set[str]) -> set[str]:
    """Modules of the project that a module imports at its own level."""
    imported: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            imported |= names & modules or {node.module} & modules
        elif isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names} & modules
    return imported


def _reachable(start: str, imports: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    ahead = list(imports[start])
    while ahead:
        module = ahead.pop()
        if module not in seen:
            seen.add(module)
            ahead += imports[module]
    return seen


MEASURES: tuple[tuple[str, int, Callable[[Sequence[SourceFile]], list[str]]], ...] = (
    ("functions over 60 lines", 0, too_long),
    ("nesting over 3", 0, too_deep),
    ("parameters over 6", 0, too_wide),
    ("public functions without docstring", 0, without_docstring),
    ("'fmt: skip'", 9, not_formatted),
    ("class names defined twice", 0, defined_twice),
    ("config fields", 83, config_fields),
    ("import circles", 0, import_circles),
)
"""Name, bound, and the function that finds what counts."""


def measure(root: Path) -> list[Measure]:
    """All measures of a checkout.

    Raises:
        SyntaxError: a file is no Python.
    """
    files = [file for folder in FOLDERS for file in sorted((root / folder).rglob("*.py"))]
    sources = [SourceFile(file.relative_to(root).as_posix(), file.read_text(encoding="utf-8")) for file in files]
    return [Measure(name, most, places(sources)) for name, most, places in MEASURES]


def main(argv: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Print the measures of a checkout; 1 where one is over its bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--where", action="store_true", help="name each place that counts")
    args = parser.parse_args(argv)
    measures = measure(root)
    for one in measures:
        over = len(one.places) > one.most
        print(f"{len(one.places):5d}  {one.name} (at most {one.most}){'  EXCEEDED' if over else ''}")
        for place in one.places if args.where and over else []:
            print(f"         {place}")
    for function, reason in EXEMPT.items():
        print(f"parameters of {function} are not counted: {reason}")
    return int(any(len(one.places) > one.most for one in measures))


if __name__ == "__main__":
    sys.exit(main())
