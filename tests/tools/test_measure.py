"""The measures of the source: each one finds what it counts in a made-up tree, and nothing in a clean one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import measure

LONG = "def f():\n    '''Docstring.'''\n" + "    x = 1\n" * 59
DEEP = """
def f(x):
    '''Docstring.'''
    for a in x:
        if a:
            while a:
                with a:
                    pass
"""
NOT_DEEP = """
def f(x):
    '''Docstring.'''
    for a in x:
        if a == 1:
            pass
        elif a == 2:
            pass
        elif a == 3:
            with a:
                pass
"""
METHODS = """
class A:
    @staticmethod
    def forward(ctx, a, b, c, d, e, f):
        '''Docstring.'''

    def g(self, a, b, c, *, d, e, f):
        '''Docstring.'''
"""
SCHEMA = (
    "class DataConfig:\n" + "".join(f"    f{n}: int = 0\n" for n in range(84)) + "class Config:\n    data: int = 0\n"
)


def places(root: Path, **files: str) -> dict[str, list[str]]:
    """The places of each measure, by its name, in a tree of these files ('__' in a name stands for '/')."""
    for name, text in files.items():
        file = root / f"{name.replace('__', '/')}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return {one.name: one.places for one in measure.measure(root) if len(one.places) > one.most}


@pytest.mark.parametrize(
    ("name", "text", "place"),
    [
        ("functions over 60 lines", LONG, "tools/a.py:1 f"),
        ("functions over 60 lines", LONG.replace("def", "async def"), "tools/a.py:1 f"),
        ("nesting over 3", DEEP, "tools/a.py:2 f"),
        ("parameters over 6", "def f(a, b, c, d, e, f, g):\n    '''Docstring.'''\n", "tools/a.py:1 f"),
        ("parameters over 6", "def _f(a, *, b, c, d, e, f, g):\n    pass\n", "tools/a.py:1 _f"),
        ("parameters over 6", METHODS.replace("e, f", "e, f, g", 1), "tools/a.py:4 forward"),
        ("parameters over 6", METHODS.replace("b, c, *", "b, ctx, c, *"), "tools/a.py:7 g"),
        ("public functions without docstring", "class A:\n    def f(self):\n        pass\n", "tools/a.py:2 f"),
    ],
)
def test_a_function_out_of_bounds_is_found(tmp_path: Path, name: str, text: str, place: str) -> None:
    assert places(tmp_path, tools__a=text) == {name: [place]}


@pytest.mark.parametrize(
    "text",
    [
        LONG.replace("    x = 1\n", "", 1),
        NOT_DEEP,
        METHODS,
        "def _f():\n    pass\n",
        "class _A:\n    def f(self):\n        def g():\n            pass\n",
        "x = 1  # fmt: skip\n" * 9,
    ],
)
def test_what_is_within_bounds_does_not_count(tmp_path: Path, text: str) -> None:
    assert places(tmp_path, tools__a=text) == {}


def test_lines_kept_from_the_formatter_are_counted(tmp_path: Path) -> None:
    found = places(tmp_path, tools__a="x = 1  # fmt: skip\n" * 9, launch__b="\ny = 2  # fmt: skip\n")
    assert list(found) == ["'fmt: skip'"]
    assert "launch/b.py:2" in found["'fmt: skip'"] and len(found["'fmt: skip'"]) == 10


def test_two_classes_of_one_name_are_found_across_folders(tmp_path: Path) -> None:
    found = places(tmp_path, flm_torchrec__a="class A: ...\n", tools__b="def _f():\n    class A: ...\n")
    assert found == {"class names defined twice": ["tools/b.py:2 A, as in flm_torchrec/a.py:1"]}


def test_settings_are_counted_but_not_sections(tmp_path: Path) -> None:
    found = places(tmp_path, flm_torchrec__config__schema=SCHEMA)
    assert list(found) == ["config fields"] and len(found["config fields"]) == 84
    assert places(tmp_path, flm_torchrec__config__schema=SCHEMA.replace("    f0: int = 0\n", "")) == {}


def test_modules_that_import_each_other_are_found(tmp_path: Path) -> None:
    files = {
        "flm_torchrec____init__": "",
        "flm_torchrec__a": "from flm_torchrec import b\n",
        "flm_torchrec__b": "import flm_torchrec.c\n",
        "flm_torchrec__c": "from flm_torchrec.a import f\n",
        "flm_torchrec__d": "from flm_torchrec.a import f\n",
    }
    circle = ["flm_torchrec.a", "flm_torchrec.b", "flm_torchrec.c"]
    assert places(tmp_path, **files) == {"import circles": circle}
    late = "def _f():\n    from flm_torchrec.a import f\n"
    assert places(tmp_path, **{**files, "flm_torchrec__c": late}) == {}


def test_only_the_named_function_may_have_more_parameters(tmp_path: Path) -> None:
    wide = "def {}(a, b, c, d, e, f, g):\n    '''Docstring.'''\n"
    assert places(tmp_path, launch__components=wide.format("pretrain")) == {}
    assert places(tmp_path, launch__components=wide.format("other")) == {
        "parameters over 6": ["launch/components.py:1 other"]
    }


def test_the_exit_code_says_whether_a_bound_is_exceeded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places(tmp_path, tools__a="def f():\n    '''Docstring.'''\n")
    assert measure.main([], tmp_path) == 0
    places(tmp_path, tools__a="def f(): ...\n")
    assert measure.main(["--where"], tmp_path) == 1
    assert "tools/a.py:1 f" in capsys.readouterr().out
