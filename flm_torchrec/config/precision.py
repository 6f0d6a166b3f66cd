"""What `loss.precision` means for the products that it does not name."""

from __future__ import annotations


def precision_beside(precision: str, device: str) -> str:
    """Precision of all products beside those of the softmax, "tf32" or "fp32".

    Where the softmax is rounded to bf16, no other product on a GPU needs more than TF32.

    Args:
        precision: `loss.precision`.
        device: "cpu" or "cuda".
    """
    return "tf32" if device == "cuda" and precision != "fp32" else "fp32"
