"""A wrong mix of torch and fbgemm is told in one line, with its mend."""

from __future__ import annotations

from pathlib import Path

import pytest

import flm_torchrec as flm
from flm_torchrec import _versions
from flm_torchrec.errors import FlmError

GOOD = {"torch": "2.13.0+cpu", "torchrec": "1.8.0", "fbgemm-gpu-cpu": "1.8.0"}
CUDA = {"torch": "2.13.0", "torchrec": "1.8.0", "fbgemm-gpu": "1.8.0"}


def check(monkeypatch: pytest.MonkeyPatch, installed: dict[str, str], driver: bool) -> None:
    monkeypatch.setattr(_versions, "_version", installed.get)
    monkeypatch.setattr(_versions, "_has_driver", lambda: driver)
    _versions.check_versions()


@pytest.mark.parametrize(("installed", "driver"), [(GOOD, False), (GOOD, True), (CUDA, True)])
def test_a_fitting_set_passes(monkeypatch: pytest.MonkeyPatch, installed: dict[str, str], driver: bool) -> None:
    check(monkeypatch, installed, driver)


@pytest.mark.parametrize(
    ("installed", "driver", "message"),
    [
        ({**GOOD, "fbgemm-gpu": "1.8.0"}, False, "both installed.*uninstall.*cpu.txt"),
        (CUDA, False, "no CUDA driver.*cpu.txt"),
        ({**GOOD, "torch": "2.12.0"}, False, "do not fit"),
        ({**GOOD, "torchrec": "1.7.0"}, False, "do not fit"),
        ({**CUDA, "fbgemm-gpu": "1.6.0"}, True, "do not fit.*gpu.txt"),
        ({k: v for k, v in GOOD.items() if k != "torch"}, False, "torch is not installed"),
        ({k: v for k, v in GOOD.items() if k != "torchrec"}, False, "torchrec is not installed"),
        ({k: v for k, v in GOOD.items() if k != "fbgemm-gpu-cpu"}, False, "fbgemm-gpu-cpu is not installed"),
    ],
)
def test_a_wrong_set_names_its_mend(
    monkeypatch: pytest.MonkeyPatch, installed: dict[str, str], driver: bool, message: str
) -> None:
    with pytest.raises(ImportError, match=message) as error:
        check(monkeypatch, installed, driver)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("missing", ["torchrec", "torch"])
def test_a_training_without_its_packages_names_what_installs_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, missing: str
) -> None:
    """Of an export alone nothing is asked, so the import of the package does not tell."""
    there = {name: version for name, version in GOOD.items() if name != missing}
    monkeypatch.setattr(_versions, "_version", there.get)
    with pytest.raises(FlmError, match=f"^{missing} is not installed; run: pip install"):
        flm.train(tmp_path, tmp_path / "run")
    assert not (tmp_path / "run").exists()
