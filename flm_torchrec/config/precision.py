"""What `loss.precision` means for the products that it does not name."""

from __future__ import annotations


def precision_beside(precision: str, device: str) -> str:
    """Precision of the products of layers, "tf32", "bf16" or "fp32".

    Where the softmax is rounded to bf16, no other product on a GPU needs more than TF32. A CPU has no TF32; it rounds
    the layers of the tower to bf16 too, in training alone and if it has instructions for that (`model.linear`).

    Args:
        precision: `loss.precision`.
        device: "cpu" or "cuda".
    """
    if device == "cuda":
        return "fp32" if precision == "fp32" else "tf32"
    return "bf16" if precision == "bf16" else "fp32"
