"""Measures of the source that the project holds itself to, one a line, with its bound. Exits 1 where one is broken.

python tools/measure.py                # the package, launch/ and tools/
python tools/measure.py --where        # also names each place that counts
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("flm_torchrec", "launch", "tools")
Function = ast.FunctionDef | ast.AsyncFunctionDef
BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.Try, ast.With, ast.AsyncWith, ast.Match)


@dataclass
class Measure:
    """What is counted, how many there may be, and where they are."""

    name: str
    most: int
    places: list[str] = field(default_factory=list)


def functions(tree: ast.AST) -> Iterator[tuple[Function, bool]]:
    """Every function, and whether it is public: no part of its name is private and it is not inside a function."""

    def walk(node: ast.AST, public: bool) -> Iterator[tuple[Function, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, Function):
                yield child, public and not child.name.startswith("_")
                yield from walk(child, False)
            elif isinstance(child, ast.ClassDef):
                yield from walk(child, public and not child.name.startswith("_"))
            else:
                yield from walk(child, public)

    yield from walk(tree, True)


def nesting(node: ast.AST, depth: int = 0) -> int:
    """Blocks inside one another; `elif` is no deeper than its `if`, and a function inside counts for itself."""
    deepest = depth
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (*Function.__args__, ast.ClassDef)):  # type: ignore[attr-defined]
            continue
        chained = isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]
        deepest = max(deepest, nesting(child, depth + (isinstance(child, BLOCKS) and not chained)))
    return deepest


def parameters(function: Function) -> int:
    """Parameters of a function, without `self` and `cls`."""
    given = function.args
    names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def config_fields(tree: ast.Module) -> list[str]:
    """Settings of the classes that config/schema.py defines; sections of `Config` are none."""
    classes = [c for c in tree.body if isinstance(c, ast.ClassDef) and c.name != "Config"]
    return [f"{c.name}.{ast.unparse(f.target)}" for c in classes for f in c.body if isinstance(f, ast.AnnAssign)]


def circles(imports: dict[str, set[str]]) -> list[str]:
    """Modules that reach themselves by what they import when they are loaded."""

    def reaches(start: str) -> bool:
        seen, ahead = set(), list(imports[start])
        while ahead:
            module = ahead.pop()
            if module == start:
                return True
            if module not in seen:
                seen.add(module)
                ahead += imports.get(module, ())
        return False

    return [module for module in imports if reaches(module)]


def imported(tree: ast.Module, modules: set[str]) -> set[str]:
    """Modules of the project that a module imports at its own level."""
    found = set()
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & modules or {node.module} & modules
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & modules
    return found


def measure(root: Path) -> list[Measure]:
    """All measures of a checkout.

    Raises:
        SyntaxError: a file is no Python.
    """
    long, deep, wide = (
        Measure("functions over 60 lines", 0),
        Measure("nesting over 3", 0),
        Measure("parameters over 6", 0),
    )
    bare, skipped = Measure("public functions without docstring", 0), Measure("'fmt: skip'", 9)
    twice, settings, circle = (
        Measure("class names defined twice", 0),
        Measure("config fields", 69),
        Measure("import circles", 0),
    )
    trees = {
        file: ast.parse(file.read_text(encoding="utf-8"))
        for folder in FOLDERS
        for file in sorted((root / folder).rglob("*.py"))
    }
    classes: dict[str, str] = {}
    for file, tree in trees.items():
        at = file.relative_to(root)
        for function, public in functions(tree):
            place = f"{at}:{function.lineno} {function.name}"
            long.places += [place] * (function.end_lineno - function.lineno >= 60)  # type: ignore[operator]
            deep.places += [place] * (nesting(function) > 3)
            wide.places += [place] * (parameters(function) > 6)
            bare.places += [place] * (public and not ast.get_docstring(function))
        skipped.places += [
            f"{at}:{n}"
            for n, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
            if line.rstrip().endswith("# fmt: skip")
        ]
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and node.name in classes:
                twice.places.append(f"{at}:{node.lineno} {node.name}, as in {classes[node.name]}")
            elif isinstance(node, ast.ClassDef):
                classes[node.name] = f"{at}:{node.lineno}"
        if at.as_posix() == "flm_torchrec/config/schema.py":
            settings.places = config_fields(tree)
    names = {
        ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): tree
        for file, tree in trees.items()
    }
    circle.places = circles({name: imported(tree, set(names)) - {name} for name, tree in names.items()})
    return [long, deep, wide, bare, skipped, twice, settings, circle]


def main() -> int:
    """Print the measures; 1 where one is over its bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--where", action="store_true", help="name each place that counts")
    args = parser.parse_args()
    found = measure(ROOT)
    for one in found:
        print(f"{len(one.places):5d}  {one.name} (at most {one.most})")
        shown = one.places if args.where and one.most < len(one.places) else []
        for place in shown:
            print(f"         {place}")
    return int(any(len(one.places) > one.most for one in found))


if __name__ == "__main__":
    sys.exit(main())
