"""What is printed, logged or kept shows no secret of an address, and nothing in a name takes effect."""

from __future__ import annotations

import io
import string
import unicodedata
from pathlib import Path
from urllib.parse import quote, quote_plus, unquote

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.table import Table

from flm_torchrec import pages
from flm_torchrec.cli import main
from flm_torchrec.errors import DataError, RunError
from flm_torchrec.export.stores.load import opened
from flm_torchrec.prepare.options import LogOptions
from flm_torchrec.prepare.sources.logs import read as read_logs
from flm_torchrec.safe_text import redact, redact_address, visible
from flm_torchrec.terminal import PlainConsole
from flm_torchrec.training.follow.sources import open_source

MARK = "Zq7vWx"
"""In each password here, so that a piece of it is found wherever it is shown."""
awkward = st.text(string.ascii_lowercase + "@/:?#%&=+;,. '\"\\[]é", max_size=6)
passwords = st.builds(lambda before, after: before + MARK + after, awkward, awkward)
NAMED = ("password", "PASSWORD", "sslpassword", "api_key", "apikey", "token", "access_token", "sig", "X-Amz-Signature")


@settings(max_examples=60)
@given(
    passwords,
    st.sampled_from(["postgresql://", "milvus:http://", "qdrant:https://", "kafka://", "s3://", "zip://a::s3://"]),
)
@example("a@" + MARK, "postgresql://")
@example("a/" + MARK, "qdrant:https://")
def test_the_password_of_a_user_is_not_shown(password: str, scheme: str) -> None:
    for written in (password, quote(password, safe=""), quote_plus(password)):
        address = f"{scheme}someone:{written}@127.0.0.1:1/x"
        said = [address, f"cannot resolve {written!r}", f"bad: {password}", f"host {written.rpartition('@')[2]}:1"]
        for text in said:
            assert MARK.lower() not in redact(text, address).lower()
        assert redact_address(address).startswith(scheme) and "127.0.0.1:1" in redact_address(address)


@settings(max_examples=60)
@given(passwords, st.sampled_from(NAMED))
def test_a_secret_parameter_is_not_shown(password: str, name: str) -> None:
    for written in (quote(password, safe=""), password.replace("=", "")):
        address = f"https://127.0.0.1/x?a=b&{name}={written}"
        assert MARK.lower() not in redact(f"{address} and {written} and {unquote(written)}", address).lower()


@settings(max_examples=60)
@given(passwords)
@example('""' + MARK)
@example("''" + MARK)
def test_the_password_of_a_libpq_string_is_not_shown(password: str) -> None:
    quoted = "'" + password.replace("\\", "\\\\").replace("'", "\\'") + "'"
    for written in (quoted, password.replace(" ", "").replace("=", "")):
        address = f"postgresql:host=127.0.0.1 password = {written} dbname=d"
        assert MARK.lower() not in redact(f"{address}: {written}", address).lower()
        assert "host=127.0.0.1" in redact_address(address)


@pytest.mark.parametrize(
    "text",
    [
        f"see https://someone:{MARK}@host/x",
        f'{{"password": "{MARK}", "user": "u"}}',
        f"Authorization: Bearer {MARK}",
        f"connect(host='h', password='x {MARK}')",
        f"AccountKey={MARK};EndpointSuffix=core",
    ],
)
def test_what_looks_like_a_secret_is_taken_out_of_any_text(text: str) -> None:
    assert MARK not in redact(text)


@pytest.mark.parametrize(
    "text",
    [
        "data/my.csv: no column 'author'; did you mean 'token_count'?", "--columns user=author_id,item=sku", "a: b",
        "/data/x@y/items.parquet", "model.batch_tokens=5", "s3://bucket/logs/2024-*.csv", "design=1 sigma=2",
    ],
)  # fmt: skip
def test_other_text_stays(text: str) -> None:
    assert redact_address(text) == redact(text) == text


@pytest.mark.parametrize(
    "address", [f"user:{MARK}@host:9092", f"u:a/{MARK}@host", f"host/t?password={MARK}", f"[u:{MARK}@h"]
)
def test_following_tells_no_password(address: str) -> None:
    with pytest.raises(DataError) as error:
        open_source(f"kafka://{address}/topic")
    assert MARK not in str(error.value)
    with pytest.raises(DataError) as error:
        open_source(f"amqp://{address}/topic")
    assert MARK not in str(error.value)


@pytest.mark.parametrize(
    "to",
    [
        f"postgresql://127.0.0.1:1/x?user=u&password={MARK}", f"postgresql://u:p%{MARK}@127.0.0.1:1/x",
        f"postgresql://u:b:{MARK}@127.0.0.1:1/x", f"postgresql:host=127.0.0.1 port=1 password='b {MARK}'",
        f"postgresql://u:b/{MARK}@127.0.0.1:1/x?sslpassword={MARK}",
    ],
)  # fmt: skip
def test_loading_tells_no_password(to: str) -> None:
    pytest.importorskip("psycopg")
    with pytest.raises(RunError) as error, opened(to, "items"):
        pass
    assert MARK not in str(error.value)


def test_a_bad_name_of_a_store_tells_no_password() -> None:
    for to in (f"postgres://u:{MARK}@h/x", f"mlvus:u:{MARK}@h", f"qdrnt:https://h?api_key={MARK}"):
        with pytest.raises(RunError, match="KIND one of") as error, opened(to, "items"):
            pass
        assert MARK not in str(error.value)


def test_preparing_keeps_no_password(tmp_path: Path) -> None:
    """The name of data set and files comes from the address, and goes into schema.json and reports."""
    (tmp_path / "x.csv").write_text("u,i\n1,2\n")
    mapping = LogOptions(columns={"user": "u", "item": "i"})
    with pytest.raises(DataError) as error:
        read_logs("csv", f"http://someone:{MARK}@127.0.0.1:1/x.csv", mapping)
    assert MARK not in str(error.value)


NASTY = [
    "[/red] chair",
    "[bold]Desk",
    "Mug :smile:",
    "[/]",
    "\x1b[31mred",
    "a\rb",
    "abc\u202efdp.exe",
    "x\u2028y",
    "\x9b31m",
]


@pytest.mark.parametrize("name", NASTY)
def test_a_name_is_printed_as_it_is(name: str) -> None:
    out = io.StringIO()
    console = PlainConsole(file=out, width=100, force_terminal=True, color_system=None)
    table = Table(title=name)
    table.add_column(name)
    table.add_row(name)
    console.print(table)
    console.print(name)
    console.rule(name)
    pages.show([name], [pages.Section(name, [name], [pages.PageTable(name, [name], [[name]])])], console)
    printed = out.getvalue()
    assert printed.count(visible(name)) >= 8
    assert all(c == "\n" or unicodedata.category(c) not in ("Cc", "Cf", "Zl", "Zp") for c in printed)


@settings(max_examples=60)
@given(st.text())
def test_visible_text_is_one_line_without_control(text: str) -> None:
    shown = visible(text)
    assert len(shown.splitlines()) <= 1
    assert all(c in "\u200c\u200d" or unicodedata.category(c) not in ("Cc", "Cf", "Cs") for c in shown)
    assert visible(shown) == shown


@pytest.mark.parametrize("text", ["Kettle", "Übergröße", "日本", "👨\u200d👩", "می\u200cخواهم", "[x] :y: \\n"])
def test_visible_leaves_letters_alone(text: str) -> None:
    assert visible(text) == text


def test_a_page_holds_no_control_character() -> None:
    bars = pages.Bars("t\x07", ["a\u202eb", "<script>"], [1, 2])
    text = pages.html("x\u202ey<b>", ["\x1b[2J"], [pages.Section("\x00", ["\u2066"], [bars])])
    assert all(c == "\n" or unicodedata.category(c) not in ("Cc", "Cf") for c in text)
    assert "<script>" not in text and "<b>" not in text


def test_errors_of_the_command_line_are_one_visible_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recommend", "--export", "no\x1b[31m\nsuch", "--user", "u"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "\x1b" not in told and r"\x1b" in told
    assert main(["prepare", "--source", "csv", "--input", f"x://u:{MARK}@h/x.csv", "--output", "o"]) == 2
    assert MARK not in capsys.readouterr().err
