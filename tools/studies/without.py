"""Run `flm` with a model that lacks one of its pieces, for studies of what the piece is worth.

    python -m tools.studies.without "context rows" train --config configs/synthetic.yaml --train.run runs/without
    python -m tools.studies.without "context rows" evaluate --run runs/without

A run that was trained so can only be read so: no file of it says what it lacks. `tools/studies/ablate.py` does both for
a variant with the key `without`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flm_torchrec.cli import main as flm
from flm_torchrec.model.heads import ContentHead, ItemContent, mlp
from flm_torchrec.model.layout import Layout
from flm_torchrec.model.tower import DenseInputs, EmbeddingOutputs, Encoded, Sequences, Tower


def without_context_rows() -> None:
    """An item of the history has no row of its own in the sequential head: its id and its content alone."""
    queries = Tower.queries

    def changed(self: Tower, seen: Sequences, layout: Layout) -> dict[str, Tensor]:
        return queries(self, replace(seen, item_context=0.0 * seen.item_context), layout)

    _put(Tower, "queries", changed)


def without_collaborative_rows() -> None:
    """The collaborative head has no rows of its own: an item's id is what it says of a user and what is scored."""
    forward = Tower.forward

    def changed(self: Tower, embedded: EmbeddingOutputs, batch: DenseInputs) -> Encoded:
        unused = 0.0 * (embedded.item_source + embedded.item_target)  # their tables still get a gradient
        own = embedded.item_id + unused
        return forward(self, replace(embedded, item_source=own, item_target=own), batch)

    _put(Tower, "forward", changed)


def without_comparison() -> None:
    """The content head does not begin as a comparison of features: an MLP of items, and one of their mean."""
    item, head = ItemContent.__init__, ContentHead.__init__

    def item_init(self: ItemContent, inputs: int, dim: int) -> None:
        item(self, inputs, dim)
        self.mlp = mlp(inputs, dim)  # its last layer is drawn, not zero

    def item_forward(self: ItemContent, features: Tensor, sketch: Tensor) -> Tensor:
        return self.mlp(features) + 0.0 * self.log_gain

    def head_init(self: ContentHead, dim: int, dropout: float, timed: bool) -> None:
        head(self, dim, dropout, timed)
        norm = self.learned.layers[-1]
        assert isinstance(norm, nn.LayerNorm)
        norm.reset_parameters()

    def head_forward(self: ContentHead, contents: Tensor, profile: Tensor, layout: Layout) -> Tensor:
        learned = self.learned(torch.cat([layout.mean(contents), layout.each(profile)], 1))
        unused = self.scale + self.recency + (0.0 if self.elapsed is None else self.elapsed.sum())
        return learned + 0.0 * F.pad(unused, (0, learned.shape[1] - 1))

    for owner, name, method in (
        (ItemContent, "__init__", item_init),
        (ItemContent, "forward", item_forward),
        (ContentHead, "__init__", head_init),
        (ContentHead, "forward", head_forward),
    ):
        _put(owner, name, method)


def without_elapsed() -> None:
    """The content head counts an item by its place in the history alone, not by how long ago it was."""
    init = ContentHead.__init__

    def changed(self: ContentHead, dim: int, dropout: float, timed: bool) -> None:
        init(self, dim, dropout, False)

    _put(ContentHead, "__init__", changed)


PIECES: dict[str, Callable[[], None]] = {
    "context rows": without_context_rows,
    "collaborative rows": without_collaborative_rows,
    "comparison": without_comparison,
    "elapsed": without_elapsed,
}
"""What can be left out that no setting leaves out."""


def _put(owner: type, name: str, method: Any) -> None:
    setattr(owner, name, method)


def main(arguments: Sequence[str]) -> int:
    """Exit code of the command of `flm`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("piece", choices=PIECES, help="what the model lacks")
    parser.add_argument("command", choices=("train", "evaluate"), help="command of flm")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="its options")
    args = parser.parse_args(arguments)
    PIECES[args.piece]()
    return flm([args.command, *args.options])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
