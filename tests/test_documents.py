"""Reading YAML and JSON that may come from anywhere: what is taken, and what is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from flm_torchrec.cli import main
from flm_torchrec.data.schema import Schema
from flm_torchrec.documents import MOST_DEPTH, Unreadable, parse_json, parse_yaml, read_json, read_text
from flm_torchrec.errors import FlmError
from flm_torchrec.export.manifest import read_manifest
from flm_torchrec.names import LISTED, closest, nearest, nearest_key
from flm_torchrec.training.checkpoint.storage import read_meta

BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30))
SHARED = "base: &base {rows: 3}\nother:\n  <<: *base\n"

simple = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=9)
documents = st.recursive(
    simple, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
)


@given(documents)
def test_what_json_writes_is_read(document: object) -> None:
    assert parse_json(json.dumps(document)) == document


@given(documents)
def test_what_yaml_writes_is_read(document: object) -> None:
    text = yaml.dump(document, Dumper=NoAliases)
    assert parse_yaml(text) == yaml.safe_load(text)


class NoAliases(yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:
        return True


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (BOMB, "repeated parts ('*') expand to more than 200,000 values"),
        ("a: &a {b: *a}", "line 1: a part that holds itself"),
        ("a: &a [*a, *a]", "line 1: a part that holds itself"),
        ("a: *b", "line 1: found undefined alias"),
        ("[" * 100_000, f"nested more than {MOST_DEPTH} deep"),
        ("\n".join(" " * n + f"k{n}:" for n in range(500)), f"nested more than {MOST_DEPTH} deep"),
        ("{a: " * 70 + "1" + "}" * 70, f"nested more than {MOST_DEPTH} deep"),
        ("a: 1\nb: 2\na: 3", "line 3: the key 'a' is there twice"),
        ("x: [{y: 1, y: 1}]", "the key 'y' is there twice"),
        ("a: " + "9" * 5000, "a number of more than 300 digits"),
        ("a: " + "1:" * 5000 + "1", "a number of more than 300 digits"),
        ("a: " + "1:" * 5000 + "1.5", "a number of more than 300 digits"),
        ("a: 0x" + "f" * 290, "more than 1000 bits"),
        ("a: 2024-99-99", "not YAML"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("a: [", "not YAML at line 1"),
        ("a: 1\n--- \nb: 1", "another document"),
        ("? [a]\n: 1\n? {b: 1}\n: 2", "not YAML"),
    ],
)
def test_yaml_that_is_refused(text: str, reason: str) -> None:
    with pytest.raises(Unreadable) as told:
        parse_yaml(text)
    assert reason in str(told.value) and "\n" not in str(told.value) and len(str(told.value)) < 300


def test_parts_may_repeat_within_bounds() -> None:
    assert parse_yaml(SHARED) == {"base": {"rows": 3}, "other": {"rows": 3}}
    assert parse_yaml("a: &a [1, 2]\nb: [*a, *a]") == {"a": [1, 2], "b": [[1, 2], [1, 2]]}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000 + "]" * 100_000, "deep"),
        ('{"a":' * 80 + "1" + "}" * 80, f"nested more than {MOST_DEPTH} deep"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' is there twice"),
        ('{"a": 1, "a": 1}', "the key 'a' is there twice"),
        ("9" * 5000, "a number of more than 300 digits"),
        ('{"a": -1' + "0" * 400 + "}", "a number of more than 300 digits"),
        ('{"a": ', "not JSON, perhaps cut short"),
        ("", "not JSON, perhaps cut short"),
    ],
)
def test_json_that_is_refused(text: str, reason: str) -> None:
    with pytest.raises(Unreadable) as told:
        parse_json(text)
    assert reason in str(told.value) and "\n" not in str(told.value) and len(str(told.value)) < 300


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings_of_a_text(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "t").write_bytes('{"ü": "日本"}\r\n'.encode(encoding))
    assert read_json(tmp_path / "t") == {"ü": "日本"}


def test_a_text_is_bounded_and_names_its_encoding(tmp_path: Path) -> None:
    file = tmp_path / "t"
    file.write_bytes(b"x" * 11)
    assert read_text(file, 11) == "x" * 11
    with pytest.raises(Unreadable, match="more than 10 bytes"):
        read_text(file, 10)
    file.write_bytes("é".encode("latin-1") + b" and so on")
    with pytest.raises(Unreadable, match="not UTF-8 at byte 0; save it as UTF-8"):
        read_text(file, 100)
    file.write_bytes(b"\xff\xfea")
    with pytest.raises(Unreadable, match="not UTF-16"):
        read_text(file, 100)
    with pytest.raises(Unreadable, match="No such file"):
        read_text(tmp_path / "none", 100)
    with pytest.raises(Unreadable, match="Is a directory"):
        read_text(tmp_path, 100)


@pytest.mark.parametrize("content", [BOMB, "[" * 3000 + "]" * 3000, '{"a": 1, "a": 1}', "9" * 5000])
def test_every_reader_refuses_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str) -> None:
    names = ("config.yaml", "schema.yaml", "manifest.json", "meta.json", "plan.json")
    for name in names:
        (tmp_path / name).write_text(content)
    for reader in (read_manifest, read_meta, lambda folder: Schema.load(folder / "schema.yaml")):
        with pytest.raises(FlmError) as told:
            reader(tmp_path)
        assert "\n" not in str(told.value) and len(str(told.value)) < 500
    config, schema, plan = (str(tmp_path / name) for name in ("config.yaml", "schema.yaml", "plan.json"))
    for command in (
        ["train", "--config", config],
        ["plan", "--spec", schema],
        ["plan", "--diff", plan, plan],
        ["train", "--train.seed", content],
    ):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and len(error) < 500


def test_the_nearest_name() -> None:
    assert nearest("trian", ["train", "plan"]) == "did you mean 'train'?"
    assert nearest("zzz", ["train", "plan"]) == "known: train, plan"
    assert nearest("zzz", []) == "there are none"
    assert nearest("zzz", map(str, range(LISTED + 3))).endswith(", and 3 more")
    assert closest("u10", ["u1", "i10", "u100"], 2) == ["u100", "u1"]
    assert nearest_key("u1o", ["a", "u10"]) == "did you mean 'u10'?"
    assert nearest_key("zzz", ["a", "b"]) == "did you mean 'a'?"
    assert nearest("x" * 10**6, ["train"]) == "known: train"
