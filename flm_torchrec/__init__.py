"""One pretrained model for content, collaborative and sequential recommendation, on TorchRec.

The Python API is `prepare`, `train`, `Run` and `Recommender`; docs/python.md shows it. They are imported when they are
first used, so that `import flm_torchrec` is cheap.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from flm_torchrec._versions import check_versions

if TYPE_CHECKING:
    from flm_torchrec.api.data import Prepared, prepare
    from flm_torchrec.api.recommender import Recommender
    from flm_torchrec.api.run import Run, train

__version__ = "0.1.0"
__all__ = ["Prepared", "Recommender", "Run", "prepare", "train"]

if find_spec("torchrec") is not None:  # serving, recommending and loading need no torchrec
    check_versions()

_PLACES = {"Prepared": "data", "Recommender": "recommender", "Run": "run"}


def __getattr__(name: str) -> Any:
    if name in ("prepare", "train"):  # modules that can be called
        return import_module(f"flm_torchrec.{name}")
    if name in _PLACES:
        return getattr(import_module(f"flm_torchrec.api.{_PLACES[name]}"), name)
    raise AttributeError(f"module 'flm_torchrec' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
