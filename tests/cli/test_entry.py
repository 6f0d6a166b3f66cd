"""The one entry of all commands: what `flm` says of itself, closed pipes, locales, names that are not known."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flm_torchrec._versions import mend
from flm_torchrec.cli.main import BROKEN_PIPE, STEPS, main
from flm_torchrec.data.dataset import PreparedData
from flm_torchrec.prepare.sources.user_list import read_users


def refused(*arguments: str) -> int:
    try:
        return main(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)


def test_flm_alone_tells_the_steps_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    error = capsys.readouterr().err
    places = [error.index(f"\n  {step} ") for step in STEPS]
    assert places == sorted(places) and "\n  forget " in error and error.count("\n") < 30


def test_versions_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {"Python", "flm_torchrec", "torch", "torchrec"} <= {line.split()[0] for line in lines}
    assert any(line.startswith("fbgemm-gpu") for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "invalid choice: 'trian'; did you mean 'train'?"),
        (["evalute"], "did you mean 'evaluate'?"),
        (["zzzzzz"], "known: "),
        (["plan", "--pipeline", "prefech"], "did you mean 'prefetch'?"),
        (["plan", "--hardwear", "h100"], "did you mean '--hardware'?"),
        (["forget", "--dta", "x", "--data", "d"], "did you mean '--data'?"),
    ],
)
def test_the_nearest_name_is_told(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert refused(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_without_torch_data_is_prepared_and_a_training_names_what_installs_it(tmp_path: Path) -> None:
    blocked = "import sys; sys.modules.update(dict.fromkeys(('torch', 'torchrec', 'fbgemm_gpu')))"
    script = f"{blocked}; from flm_torchrec.cli import main; print([main(line.split()) for line in sys.argv[1:]])"
    sizes = "--synthetic-users 12 --synthetic-items 100 --synthetic-events 4"
    lines = [f"prepare --source synthetic {sizes} --output d", "train --data.path d --train.run r"]
    done = subprocess.run([sys.executable, "-c", script, *lines], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["[0, 2]"], done.stderr
    assert done.stderr.splitlines()[-1:] == [f"error: flm train: needs torch; run: {mend()}"]


@pytest.mark.parametrize("arguments", [["train", "--help"], ["--version"]])
def test_a_reader_that_ends_is_no_error(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "flm_torchrec", *arguments]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert job.stdout is not None and job.stderr is not None
    job.stdout.close()
    assert job.stderr.read() == b""
    # argparse drops what it cannot print of a help, and goes on.
    assert job.wait(timeout=120) in (BROKEN_PIPE, 0 if "--help" in arguments else BROKEN_PIPE)


def test_a_table_whose_reader_ends_is_no_error() -> None:
    """Tables are printed by rich, which ends a command with exit code 1 by itself."""
    program = """
import sys
from flm_torchrec.cli import main
from flm_torchrec.terminal import PlainConsole
lines = lambda arguments: [PlainConsole().print("x" * 70) for _ in range(9999)] and 0
sys.modules["flm_torchrec.cli.main"]._run = lines
sys.exit(main())
"""
    job = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert job.stdout is not None and job.stderr is not None
    job.stdout.close()
    assert job.stderr.read() == b"" and job.wait(timeout=120) == BROKEN_PIPE


def test_a_locale_of_ascii_is_no_error() -> None:
    environment = {
        **os.environ,
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONIOENCODING": "ascii",
    }
    for arguments in (["--help"], ["train", "--data.path", "größe"]):
        done = subprocess.run(
            [sys.executable, "-m", "flm_torchrec", *arguments], env=environment, capture_output=True, timeout=120
        )
        assert b"Traceback" not in done.stderr and (done.stdout + done.stderr).isascii()


def test_what_a_stream_cannot_write_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(written, encoding="ascii", line_buffering=True))
    assert main(["train", "--data.path", "größe"]) == 2
    assert b"gr??e/schema.yaml: not found" in written.getvalue()


def test_missing_data_are_not_to_be_filled_with_made_up_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--data.path", "/nonexistent/folder"]) == 2
    error = capsys.readouterr().err
    assert "prepare your logs first" in error and "--output /nonexistent" not in error


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_file_of_users_is_read_however_it_was_saved(tmp_path: Path, encoding: str, end: str) -> None:
    lines = ["ü1", " 2", "", "u\u20283", "ü1", "  "]
    for name in ("users.txt", "users"):
        (tmp_path / name).write_bytes(end.join([*lines, ""]).encode(encoding))
        assert read_users(str(tmp_path / name)).to_pylist() == ["ü1", "2", "u\u20283"]


def test_a_file_that_is_no_text_names_nobody(
    small: PreparedData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "users.txt").write_bytes("ü".encode("latin-1"))
    assert main(["forget", "--data", str(small.path), "--users", str(tmp_path / "users.txt")]) == 2
    assert "not UTF-8 at byte 0" in capsys.readouterr().err
