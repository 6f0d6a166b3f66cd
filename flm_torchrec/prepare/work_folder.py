"""Work in progress beside an output: taken up again after a kill, gone at the end."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb

from flm_torchrec.errors import DataError
from flm_torchrec.prepare.intake import FrameShard
from flm_torchrec.safe_text import first_line

FORMAT = 2
"""Of what is in the folder: raised when shards are stored in another way."""


@contextmanager
def work_folder(output: Path, made_of: list[Any]) -> Iterator[Path]:
    """A folder beside the output for work in progress; one that a kill left is used again, another's is removed.

    Gone at the end and after an error, but not after an interruption. Claim the output first.

    Args:
        made_of: tells all that the work is made of; what it is of is not taken for work on anything else.

    Raises:
        DataError: disk or memory run out, or the place cannot be written.
    """
    digest = hashlib.sha256(json.dumps([FORMAT, *made_of]).encode()).hexdigest()[:16]
    work = output.with_name(f".{output.name}.work-{digest}")
    try:
        ours = re.compile(rf"\.{re.escape(output.name)}\.work-[0-9a-f]{{16}}")
        for left in output.parent.iterdir():
            if left != work and ours.fullmatch(left.name) and not left.is_symlink():
                shutil.rmtree(left)
        work.mkdir(mode=0o700, exist_ok=True)  # it holds the keys as they are in the logs
        for left in work.iterdir():
            if not left.name.startswith("rows-") or FrameShard.identity in made_of:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        yield work
        shutil.rmtree(work)
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
