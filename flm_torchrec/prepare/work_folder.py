"""Intermediate files beside an output: used again after a kill, gone at the end."""

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
from flm_torchrec.prepare.sources.source_data import IN_MEMORY
from flm_torchrec.safe_text import first_line

FORMAT = 3
"""Of the files in the folder: raised when shards are stored in another way."""


@contextmanager
def work_folder(output: Path, made_of: list[Any]) -> Iterator[Path]:
    """A folder beside the output for intermediate files. Claim the output first.

    The folder is removed at the end and after an error, but not after a kill. The next preparation of the same output
    uses it again if it is made of the same inputs, and removes it otherwise. After Ctrl-C it stays only where the
    inputs are files: nothing can go on from a table that was in memory.

    Args:
        made_of: everything that the files of shards depend on; it becomes JSON, and a digest of it the folder's name.

    Raises:
        DataError: disk or memory run out, or the folder cannot be written.
    """
    digest = hashlib.sha256(json.dumps([FORMAT, *made_of]).encode()).hexdigest()[:16]
    folder = output.with_name(f".{output.name}.work-{digest}")
    resumable = IN_MEMORY not in made_of
    try:
        _remove_others(output, folder)
        folder.mkdir(mode=0o700, exist_ok=True)  # it holds the keys as they are in the logs
        _remove_unfinished(folder, resumable)
        yield folder
        shutil.rmtree(folder)
    except (OSError, duckdb.IOException) as error:
        shutil.rmtree(folder, ignore_errors=True)
        reason = getattr(error, "strerror", None) or first_line(error)
        raise DataError(f"{output}: cannot be written ({reason}); give another --output") from error
    except duckdb.OutOfMemoryException as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise DataError(f"--memory: too little for this data ({first_line(error)}); give more") from error
    except Exception:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    except KeyboardInterrupt:
        if not resumable:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _remove_others(output: Path, folder: Path) -> None:
    """Remove the work folders of other preparations of the same output."""
    ours = re.compile(rf"\.{re.escape(output.name)}\.work-[0-9a-f]{{16}}")
    for path in output.parent.iterdir():
        if path != folder and ours.fullmatch(path.name) and not path.is_symlink():
            shutil.rmtree(path)


def _remove_unfinished(folder: Path, resumable: bool) -> None:
    """Remove all but the files of shards, and those too unless they are `resumable`."""
    for path in folder.iterdir():
        if resumable and path.name.startswith("rows-"):
            continue
        shutil.rmtree(path) if path.is_dir() else path.unlink()
