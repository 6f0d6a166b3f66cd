"""Machine code that this package has compiled: where it is kept, and whether it may be loaded."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")
INSTRUCTIONS = re.compile(r"^(?:flags|features|isa)\s*:(.*)$", re.MULTILINE | re.IGNORECASE)
"""Of x86, of ARM and s390, of RISC-V."""
VENDOR = re.compile(r"^vendor_id\s*:\s*(\S+)", re.MULTILINE)


def processor_instructions() -> set[str]:
    """Names of the instructions of this processor, in lower case; empty where the system does not say."""
    found = INSTRUCTIONS.search(_cpu_info())
    return set(found[1].lower().split()) if found else set()


def processor_vendor() -> str:
    """Such as AuthenticAMD; empty where the system does not say."""
    found = VENDOR.search(_cpu_info())
    return found[1] if found else ""


def _cpu_info() -> str:
    return CPU_INFO.read_text(encoding="utf-8", errors="replace") if CPU_INFO.is_file() else ""


def code_folder(name: str) -> Path:
    """`flm_torchrec/name` in `$XDG_CACHE_HOME`, by default in `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flm_torchrec" / name


def open_to_others(path: Path) -> bool:
    """Whether somebody else than this user and root may have written a file or folder: code there is never loaded.

    Raises:
        OSError: it is not there, or may not be looked at.
    """
    status = path.stat()
    return status.st_uid not in (0, os.geteuid()) or bool(stat.S_IMODE(status.st_mode) & 0o022)
