"""Vectors as columns: fp32, fp16, or int8 in FBGEMM's row-wise format."""

from __future__ import annotations

import fbgemm_gpu  # noqa: F401 (registers the operators)
import numpy as np
import pyarrow as pa
import torch

from flm_torchrec.errors import RunError
from flm_torchrec.export.manifest import Quantise


def encode(rows: np.ndarray, quantise: Quantise) -> pa.FixedSizeListArray:
    """[n, D] float32 → a column of n lists.

    none: D float32. fp16: D halffloat. int8: D + 8 uint8, as FBGEMM's tables hold them: D numbers q in 0 … 255, then
    scale and bias of the row as float32; the value is q * scale + bias (Guan et al., arXiv 1911.02079).

    Raises:
        RunError: a number is none, or too large for fp16.
    """
    with np.errstate(over="ignore"):  # told below
        stored = rows.astype(np.float16) if quantise == "fp16" else np.ascontiguousarray(rows)
    if not np.isfinite(stored).all():
        raise RunError("a vector has NaN, infinity or a number too large for its format; train again with a lower rate")
    if quantise == "int8":
        stored = torch.ops.fbgemm.FloatToFused8BitRowwiseQuantized(torch.from_numpy(stored)).numpy()
    return pa.FixedSizeListArray.from_arrays(pa.array(stored.ravel()), stored.shape[1])


def decode(column: pa.ChunkedArray | pa.FixedSizeListArray) -> np.ndarray:
    """The column of `encode` → [n, D] float32; how it is stored is told by its type."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    stored = array.flatten().to_numpy().reshape(len(array), array.type.list_size)
    if stored.dtype == np.uint8:
        return torch.ops.fbgemm.Fused8BitRowwiseQuantizedToFloat(torch.tensor(stored)).numpy()
    return stored.astype(np.float32, copy=False)
