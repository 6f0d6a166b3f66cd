"""Options of `flm prepare` come from the fields of dataclasses: names, defaults, ranges, one-line errors."""

from __future__ import annotations

import argparse
from dataclasses import field
from typing import Annotated, Literal

import pytest
from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from flm_torchrec.cli import main
from flm_torchrec.cli.main import _parser
from flm_torchrec.config.options import add_options, options_from
from flm_torchrec.errors import ConfigError
from flm_torchrec.prepare.options import LogOptions, MachineOptions, PrepareOptions, Recipe

PREPARE = """
    --columns --currency --decimal --dedup --dedup-window --duplicates --encoding --engine --event-features
    --exclude-users --hash-users --help
    --input --item-features --item-key --items --k-core --keep-unseen-items --list-separator --max-dropped
    --memory --min-count --min-item-events --min-user-events --min-users --min-value --multiline --output --overwrite
    --quantiles --separator --session-gap --source --synthetic-collaborative --synthetic-content --synthetic-events
    --synthetic-items --synthetic-seed --synthetic-sequential --synthetic-users --table-version --tables --text-buckets
    --text-cache --text-ngrams --thousands --threads --time-unit --title --user-features --user-key --users
"""


@dataclass(frozen=True)
class Inner:
    """Inside."""

    deep_flag: Annotated[bool, Field(description="a truth")] = False


@dataclass(frozen=True)
class Outer:
    """Outside: of 100 %."""

    some_count: Annotated[int, Field(ge=2, lt=9, title="N", description="up to 100 %")] = 3
    kind: Annotated[Literal["a", "b"], Field(description="one of two")] = "a"
    level: Annotated[float | None, Field(description="perhaps a number")] = None
    names: Annotated[tuple[str, ...], BeforeValidator(lambda text: tuple(text.split("+"))), Field(description="+")] = ()
    inner: Inner = field(default_factory=Inner)


def parsed(*given: str, prefix: str = "") -> Outer:
    parser = argparse.ArgumentParser()
    add_options(parser, Outer, prefix)
    return options_from(Outer, parser.parse_args(given), prefix)


def test_options_fill_the_dataclass() -> None:
    assert parsed() == Outer()
    given = ("--some-count", "8", "--kind", "b", "--level", "-1.5", "--names", "x+y", "--deep-flag")
    assert parsed(*given) == Outer(8, "b", -1.5, "x+y", Inner(True))  # type: ignore[arg-type]
    assert parsed("--my-some-count", "2", prefix="my-").some_count == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--some-count", "1"), "--some-count 1: must be at least 2"),
        (("--some-count", "9"), "--some-count 9: must be a whole number from 2 below 9"),
    ],
)
def test_a_value_out_of_range_names_the_option(given: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parsed(*given)
    assert str(error.value) == message


def test_the_help_names_range_placeholder_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed("--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert "--some-count N up to 100 %; a whole number from 2 below 9 (default: 3)" in shown
    assert "--kind {a,b} one of two (default: a)" in shown and "--level VALUE perhaps a number; a number" in shown
    assert "Outside: of 100 %:" in shown and "Inside:" in shown


def test_flm_prepare_keeps_its_options_and_defaults() -> None:
    _, subparsers = _parser()
    parser = subparsers.choices["prepare"]
    assert {option for action in parser._actions for option in action.option_strings} - {"-h"} == set(PREPARE.split())
    args = parser.parse_args(["--output", "x"])
    assert options_from(PrepareOptions, args) == PrepareOptions()
    assert options_from(MachineOptions, args) == MachineOptions()
    assert options_from(LogOptions, args) == LogOptions()
    assert options_from(Recipe, args, "synthetic-") == Recipe()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--k-core", "-1"], "--k-core -1: must be at least 0"),
        (["--min-value", "nan"], "--min-value nan: must be a number"),
        (["--min-value", "inf"], "--min-value inf: must be a number"),
        (["--quantiles", "1"], "--quantiles 1: must be at least 2"),
        (["--threads", "-2"], "--threads -2: must be at least 0"),
        (["--max-dropped", "nan"], "--max-dropped nan: must be a share, from 0 to 1"),
        (["--dedup-window", "5"], "--dedup-window: give it with --dedup window, and only then"),
        (["--tables", "user_id=zch:1"], "--tables: 'user_id=zch:1': zch needs 'rows' of at least 2"),
    ],
)
def test_a_wrong_option_of_prepare_is_one_line(
    tmp_path, capsys: pytest.CaptureFixture[str], given: list[str], message: str
) -> None:
    assert main(["prepare", "--output", str(tmp_path / "out"), *given]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
    assert not list(tmp_path.iterdir())
