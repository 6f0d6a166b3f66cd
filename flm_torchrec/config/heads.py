"""The heads of the model, in the order of every stacked tensor, table and file that holds one row a head."""

from __future__ import annotations

HEADS = ("content", "collaborative", "sequential")
FUSED = "fused"
REPRESENTATIONS = (*HEADS, FUSED)
"""What a user is represented by: each head, and their fusion."""
