"""Run by test_alike as two ranks: `flm` again and again in one process, each rank with arguments of its own.

Argument: a JSON file of [[arguments of rank 0, arguments of rank 1], …]. Each rank prints a line of JSON: by call its
exit code and what it printed on standard error.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

from flm_torchrec.cli import main


def called(arguments: list[str]) -> list[object]:
    told = StringIO()
    with redirect_stderr(told), redirect_stdout(StringIO()):
        try:
            code: object = main(arguments)
        except SystemExit as stop:
            code = stop.code
    return [code, told.getvalue()]


if __name__ == "__main__":
    rank = int(os.environ["RANK"])
    calls = json.loads(Path(sys.argv[1]).read_text())
    found = []
    for number, call in enumerate(calls):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)  # each call is a job of its own to those who tell errors
        found.append(called(call[rank]))
    Path(sys.argv[1]).with_suffix(f".{rank}").write_text(json.dumps(found))
