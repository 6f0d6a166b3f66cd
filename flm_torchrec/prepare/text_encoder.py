"""Frozen text encoders on disk: a folder → vectors of texts. Nothing is downloaded.

Three kinds of folder are read, by what is in them:
model2vec: `config.json` with `"model_type": "model2vec"`; static vectors of tokens, the fastest on a CPU.
ONNX: `model.onnx` (or `onnx/model.onnx`) with `tokenizer.json`.
sentence-transformers: `modules.json`; PyTorch, on a GPU where there is one.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np

from flm_torchrec.documents import Unreadable, read_json
from flm_torchrec.errors import DataError
from flm_torchrec.safe_text import first_line

EncoderKind = Literal["model2vec", "onnx", "sentence-transformers"]
BATCH = 256
"""Texts that are encoded at once."""
MOST_TOKENS = 256
"""Tokens of a text that an ONNX encoder reads; later ones are left out."""
PACKAGES: dict[EncoderKind, tuple[str, ...]] = {
    "model2vec": ("model2vec",),
    "onnx": ("onnxruntime", "tokenizers"),
    "sentence-transformers": ("sentence_transformers",),
}
INSTALLED_BY = {"sentence_transformers": "pip install sentence-transformers"}
NOT_OF_THE_ENCODER = (".md", ".png", ".gitattributes")
"""Endings of files that change no vector."""
ENDING = "_vector"
"""After the name of a text feature: the feature of its vectors."""
Forward = Callable[[list[str]], np.ndarray]
"""Texts → [texts, width]."""


def encoder_kind(folder: Path, option: str) -> EncoderKind:
    """The kind of an encoder's folder; nothing is loaded.

    Raises:
        DataError: no folder, none of the three kinds, or the package that reads it is not installed.
    """
    if not folder.is_dir():
        raise DataError(f"{option}: {folder}: not found; give the folder of a text encoder that is on this machine")
    kind = _kind(folder)
    if kind is None:
        raise DataError(
            f"{option}: {folder}: no text encoder; give a folder of model2vec, one with model.onnx and tokenizer.json,"
            " or one of sentence-transformers"
        )
    for package in PACKAGES[kind]:
        if find_spec(package) is None:
            install = INSTALLED_BY.get(package, "pip install 'flm_torchrec[text]'")
            raise DataError(f"{option}: {folder}: a folder of {kind} needs {package}; {install}")
    return kind


def encoder_digest(folder: Path) -> str:
    """16 hexadecimal digits that two folders share only if their encoders are the same, file by file."""
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = file.relative_to(folder).as_posix()
        if name.endswith(NOT_OF_THE_ENCODER) or any(part.startswith(".") for part in Path(name).parts):
            continue
        with file.open("rb") as opened:
            digest.update(f"{name} {hashlib.file_digest(opened, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()[:16]


class TextEncoder:
    """A frozen encoder. Vectors have a mean square of 1, as standardised numbers have.

    Args:
        folder: of the encoder.
        option: what named the folder, for errors.

    Raises:
        DataError: the folder is no encoder, is damaged, or needs a package that is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str], option: str = "text encoder") -> None:
        self.folder, self.option = Path(folder), option
        kind = encoder_kind(self.folder, option)
        try:
            self._forward = _FORWARD[kind](self.folder)
        except Exception as error:  # whatever the packages raise for a damaged file
            raise self._damaged(error) from error

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """[texts, width] float32.

        Raises:
            DataError: the encoder fails, or gives no finite vectors of one width.
        """
        longest_first = sorted(range(len(texts)), key=lambda n: -len(texts[n]))  # texts of one batch need one length
        parts = [longest_first[start : start + BATCH] for start in range(0, len(texts), BATCH)]
        found: np.ndarray | None = None
        for part in parts:
            try:
                vectors = np.asarray(self._forward([texts[n] for n in part]), np.float32)
            except Exception as error:  # as above
                raise self._damaged(error) from error
            if vectors.ndim != 2 or len(vectors) != len(part) or not np.isfinite(vectors).all():
                raise DataError(f"{self.option}: {self.folder}: gives no finite vector for each text; use another")
            if found is None:
                found = np.empty((len(texts), vectors.shape[1]), np.float32)
            found[part] = vectors
        if found is None:
            return np.empty((0, 0), np.float32)
        length = np.linalg.norm(found, axis=1, keepdims=True)
        return np.divide(found * np.sqrt(found.shape[1]), length, out=np.zeros_like(found), where=length > 0)

    def _damaged(self, error: Exception) -> DataError:
        return DataError(f"{self.option}: {self.folder}: cannot encode ({first_line(error)}); copy the encoder again")


def _kind(folder: Path) -> EncoderKind | None:
    try:
        config = read_json(folder / "config.json")
    except (OSError, Unreadable):
        config = {}
    if isinstance(config, dict) and config.get("model_type") == "model2vec":
        return "model2vec"
    if (folder / "tokenizer.json").is_file() and _onnx_file(folder).is_file():
        return "onnx"
    return "sentence-transformers" if (folder / "modules.json").is_file() else None


def _onnx_file(folder: Path) -> Path:
    alone = folder / "model.onnx"
    return alone if alone.is_file() else folder / "onnx" / "model.onnx"


def _model2vec(folder: Path) -> Forward:
    from model2vec import StaticModel

    model = StaticModel.from_pretrained(folder)
    return lambda texts: model.encode(texts, show_progress_bar=False)


def _onnx(folder: Path) -> Forward:
    import onnxruntime
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(MOST_TOKENS)
    tokenizer.enable_padding()
    session = onnxruntime.InferenceSession(str(_onnx_file(folder)), providers=onnxruntime.get_available_providers())
    names = {one.name for one in session.get_inputs()}
    outputs = [one.name for one in session.get_outputs()]
    wanted = "sentence_embedding" if "sentence_embedding" in outputs else outputs[0]
    first = _pools_first(folder)

    def forward(texts: list[str]) -> np.ndarray:
        encoded = tokenizer.encode_batch(texts)
        of = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
        given = {n: np.array([getattr(e, of[n]) for e in encoded], np.int64) for n in of if n in names}
        (found,) = session.run([wanted], given)
        if found.ndim == 2:
            return found
        mask = np.array([e.attention_mask for e in encoded], np.float32)[:, :, None]  # [B, L, 1]
        return found[:, 0] if first else (found * mask).sum(1) / np.maximum(mask.sum(1), 1)

    return forward


def _pools_first(folder: Path) -> bool:
    """Whether the vector of a text is that of its first token; else it is the mean over the tokens."""
    file = folder / "1_Pooling" / "config.json"
    if not file.is_file():
        return False
    config: dict[str, Any] = read_json(file)
    modes = [name for name, on in config.items() if name.startswith("pooling_mode_") and on is True]
    if modes not in (["pooling_mode_cls_token"], ["pooling_mode_mean_tokens"]):
        raise ValueError(f"{file.name}: pools by {', '.join(modes) or 'nothing'}, not by the first token or the mean")
    return modes == ["pooling_mode_cls_token"]


def _sentence_transformers(folder: Path) -> Forward:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), local_files_only=True)
    return lambda texts: model.encode(texts, batch_size=BATCH, show_progress_bar=False)


_FORWARD: dict[EncoderKind, Callable[[Path], Forward]] = {
    "model2vec": _model2vec,
    "onnx": _onnx,
    "sentence-transformers": _sentence_transformers,
}
