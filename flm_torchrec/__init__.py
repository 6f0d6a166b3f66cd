"""One pretrained model for content, collaborative and sequential recommendation, on TorchRec."""

from importlib.util import find_spec

from flm_torchrec._versions import check_versions

__version__ = "0.1.0"

if find_spec("torchrec") is not None:  # serving, recommending and loading need no torchrec
    check_versions()
