"""Work in progress beside an output: one at a time, taken up again after a kill, gone at the end."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb

from flm_torchrec.data.intake import FrameShard
from flm_torchrec.errors import DataError
from flm_torchrec.messages import first_line

LOCK = "lock"
FORMAT = 2
"""Of what is in the folder: raised when shards are stored in another way."""


class Busy(DataError):
    """The folder is another's."""


@contextmanager
def work_folder(output: Path, made_of: list[Any]) -> Iterator[Path]:
    """A folder beside the output for work in progress; one that a kill left is used again, another's is removed.

    Gone at the end and after an error, but not after an interruption.

    Args:
        made_of: tells all that the work is made of; what it is of is not taken for work on anything else.

    Raises:
        DataError: another preparation writes the output, disk or memory run out, or the place cannot be written.
    """
    digest = hashlib.sha256(json.dumps([FORMAT, *made_of]).encode()).hexdigest()[:16]
    work = output.with_name(f".{output.name}.work-{digest}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        for left in output.parent.glob(f".{glob.escape(output.name)}.work-*"):
            if left != work:
                with _alone(left, output):
                    shutil.rmtree(left)
        work.mkdir(exist_ok=True)
        with _alone(work, output):
            for left in work.iterdir():
                if left.name != LOCK and (not left.name.startswith("rows-") or FrameShard.identity in made_of):
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
            yield work
            shutil.rmtree(work)
    except Busy:
        raise
    except (OSError, duckdb.IOException) as error:
        shutil.rmtree(work, ignore_errors=True)
        reason = getattr(error, "strerror", None) or first_line(error)
        raise DataError(f"{output}: cannot be written ({reason}); give another --output") from error
    except duckdb.OutOfMemoryException as error:
        shutil.rmtree(work, ignore_errors=True)
        raise DataError(f"--memory: too little for this data ({first_line(error)}); give more") from error
    except Exception:
        shutil.rmtree(work, ignore_errors=True)
        raise


@contextmanager
def _alone(work: Path, output: Path) -> Iterator[None]:
    with (work / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Busy(f"{output}: another preparation is writing it; wait for it or give another --output") from error
        yield
