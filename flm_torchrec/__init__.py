"""One pretrained model for content, collaborative and sequential recommendation, on TorchRec."""

from flm_torchrec._versions import check_versions

__version__ = "0.1.0"

check_versions()
