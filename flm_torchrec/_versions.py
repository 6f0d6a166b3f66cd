"""Check that the installed torch, torchrec and fbgemm fit each other and this machine, without importing them."""

from __future__ import annotations

import ctypes
import platform
import re
from importlib import metadata
from pathlib import Path

from flm_torchrec.errors import InstallError

TORCHREC = "1.8.0"
"""What requirements/cpu.txt and gpu.txt pin."""
SOURCE = Path(__file__).resolve().parents[1]
"""Of a checkout: it has the folder requirements/."""


def mend(cuda: bool | None = None) -> str:
    """The command that installs a set that fits: of a checkout its pins, of an installed wheel its extras.

    torchrec is installed alone for a CPU, as its metadata asks for the CUDA build of fbgemm.

    Args:
        cuda: of the CUDA build; None: if this machine has a driver.
    """
    kind = "gpu" if (_has_driver() if cuda is None else cuda) else "cpu"
    if (SOURCE / "requirements" / f"{kind}.txt").is_file():
        return f"pip install --no-deps -r requirements/{kind}.txt"
    alone = f" && pip install --no-deps torchrec=={TORCHREC}" if kind == "cpu" else ""
    return f"pip install 'flm_torchrec[{kind}]'{alone}"


def check_versions() -> None:
    """Raise one line that names versions which do not fit, and the command that mends them.

    fbgemm 1.N is built against torch 2.(N+5), and torchrec 1.N against fbgemm 1.N.

    Raises:
        InstallError: a package is missing, both builds of fbgemm are installed, versions do not fit, or fbgemm's CUDA
            build is installed on a machine without a driver.
    """
    torch, torchrec = _version("torch"), _version("torchrec")
    cpu, cuda = _version("fbgemm-gpu-cpu"), _version("fbgemm-gpu")
    command = mend()
    if cpu and cuda:
        raise InstallError(
            "fbgemm-gpu and fbgemm-gpu-cpu are both installed and overwrite each other;"
            f" run: pip uninstall -y fbgemm-gpu fbgemm-gpu-cpu && {command}"
        )
    fbgemm = cpu or cuda
    for name, version in (("torch", torch), ("torchrec", torchrec), ("fbgemm-gpu or fbgemm-gpu-cpu", fbgemm)):
        if version is None:
            raise InstallError(f"{name} is not installed; run: {command}")
    assert torch and torchrec and fbgemm
    if _minor(torch) != _minor(fbgemm) + 5 or _minor(torchrec) != _minor(fbgemm):
        raise InstallError(
            f"torch {torch}, torchrec {torchrec} and fbgemm {fbgemm} do not fit (fbgemm 1.N goes with torchrec 1.N"
            f" and torch 2.(N+5)); run: {command}"
        )
    if cuda and not _has_driver():
        raise InstallError(
            "fbgemm-gpu is the CUDA build and this machine has no CUDA driver;"
            f" run: pip uninstall -y fbgemm-gpu && {mend(cuda=False)}"
        )


def installed() -> dict[str, str]:
    """Versions of Python, this package and the packages that its results depend on, if they are installed."""
    names = ("flm_torchrec", "torch", "torchrec", "fbgemm-gpu-cpu", "fbgemm-gpu", "faiss-cpu", "numpy", "pyarrow")
    found = {name: _version(name) for name in names}
    return {"Python": platform.python_version(), **{name: version for name, version in found.items() if version}}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _minor(version: str) -> int:
    found = re.match(r"\d+\.(\d+)", version)
    return int(found.group(1)) if found else -1


def _has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True
