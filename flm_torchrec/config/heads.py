"""The heads of the model. Stacked tensors, tables and files with one row per head have this order."""

from __future__ import annotations

HEADS = ("content", "collaborative", "sequential")
FUSED = "fused"
REPRESENTATIONS = (*HEADS, FUSED)
"""The representations of a user: one of each head, and their fusion."""
