"""Vectors as columns: fp32, fp16, or int8 in FBGEMM's row-wise format, with NumPy alone."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from flm_torchrec.errors import RunError
from flm_torchrec.export.manifest import Quantise

TAIL = 8
"""Bytes behind a row's numbers: scale and bias, each float32."""
SMALL = 1e-8
"""FBGEMM adds this to a row's range, so that the range of a row of equal numbers is not zero."""


def stored_type(quantise: Quantise, dim: int) -> pa.DataType:
    """The type of a column of `encode` after it is read from a file."""
    kinds = {"none": (pa.float32(), dim), "fp16": (pa.float16(), dim), "int8": (pa.uint8(), dim + TAIL)}
    value, size = kinds[quantise]
    return pa.list_(pa.field("element", value), size)


def encode(rows: np.ndarray, quantise: Quantise) -> pa.FixedSizeListArray:
    """[n, D] float32 → a column of n lists.

    none: D float32. fp16: D halffloat. int8: D + 8 uint8, as FBGEMM's tables hold them: D numbers q in 0 … 255, then
    scale and bias of the row as float32; the value is q * scale + bias (Guan et al., arXiv 1911.02079).

    Raises:
        RunError: a number is not finite, or too large for the format.
    """
    with np.errstate(over="ignore"):  # reported below
        stored = rows.astype(np.float16) if quantise == "fp16" else np.ascontiguousarray(rows)
    if not np.isfinite(stored).all():
        raise RunError("a vector has NaN, infinity or a number too large for its format; train again with a lower rate")
    if quantise == "int8":
        stored = _quantised(stored)
    return pa.FixedSizeListArray.from_arrays(pa.array(stored.ravel()), stored.shape[1])


def decode(column: pa.ChunkedArray | pa.FixedSizeListArray) -> np.ndarray:
    """A column of `encode` → [n, D] float32. The type of the column says how it is stored."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    stored = array.flatten().to_numpy().reshape(len(array), array.type.list_size)
    if stored.dtype == np.uint8:
        scale, bias = np.ascontiguousarray(stored[:, -TAIL:]).view(np.float32).T[:, :, None]
        # In double precision, as FBGEMM multiplies and adds with one rounding.
        return (stored[:, :-TAIL] * scale.astype(np.float64) + bias).astype(np.float32)
    return stored.astype(np.float32, copy=False)


def _quantised(rows: np.ndarray) -> np.ndarray:
    """[n, D] float32 → [n, D + 8] uint8, bit for bit as FBGEMM's FloatToFused8BitRowwiseQuantized."""
    low, high = rows.min(1, keepdims=True), rows.max(1, keepdims=True)
    with np.errstate(over="ignore"):  # reported below
        span = high - low
    if not np.isfinite(span).all():
        raise RunError("the numbers of a vector are too far apart for int8; train again with a lower rate")
    inverse = np.float32(255) / (span + np.float32(SMALL))
    numbers = np.rint((rows - low) * inverse).astype(np.uint8)
    scale = span / np.float32(255)
    return np.concatenate([numbers, scale.view(np.uint8), low.view(np.uint8)], axis=1)


def unit(vectors: np.ndarray) -> np.ndarray:
    """[n, D] → the same with length 1; zeros stay."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
