"""The trained model as an encoder: users and items → vectors in the one space."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy

import numpy as np
import torch
from torch import Tensor, nn

from flm_torchrec.config import Config
from flm_torchrec.data.batch import Batch
from flm_torchrec.data.collate import Assembler
from flm_torchrec.data.splits import Examples
from flm_torchrec.distributed.comm import Comm
from flm_torchrec.evaluation.protocol import Of
from flm_torchrec.mixture import Mixture
from flm_torchrec.model.pretrain import PretrainModel
from flm_torchrec.model.space import width
from flm_torchrec.model.tower import Encoded


class ModelEncoder:
    """Encodes examples and items with a sharded model.

    All methods are collective: every rank calls them equally often, if need be with nothing to encode.

    Args:
        assembler: of batches to encode.
        config: its `eval` bounds the users and items of one call.
    """

    def __init__(
        self,
        model: nn.Module,
        assembler: Assembler,
        examples: Examples,
        comm: Comm,
        config: Config,
    ) -> None:
        self.dim = width(config.model.dim)
        self.max_history = config.data.max_history
        self.assembler = assembler
        self.model = model
        self.data = assembler.data
        self.examples = examples
        self.comm = comm
        self.check: Callable[[], None] = lambda: None

    @property
    def growth(self) -> int:
        """Bytes of the items' sketches that are kept and not made yet."""
        return self.assembler.sketches.growth

    @property
    def mixture(self) -> Mixture | None:
        """The mixture that scores in place of the fused vector, if one does."""
        model: PretrainModel = self.model.module  # type: ignore[assignment]
        return model.tower.fusion.mixture()

    def checked(self, check: Callable[[], None]) -> ModelEncoder:
        """The same encoder, but it calls `check` on every rank before each block; `check` may raise to end the work."""
        copied = copy(self)
        copied.check = check
        return copied

    def of(self, examples: Examples) -> ModelEncoder:
        """The same encoder for the users of other examples."""
        copied = copy(self)
        copied.examples = examples
        return copied

    def users(self, rows: np.ndarray) -> dict[str, Tensor]:
        """[b] indices of examples → by name of REPRESENTATIONS, [b, D] float32 after the events before the example."""
        self.check()
        examples = self.examples.take(self._padded(rows))
        start = np.maximum(self.data.offsets[examples.user], examples.end - self.max_history)
        batch = self.assembler.encoding(examples.user, start, examples.end)
        encoded = self._encode(batch)
        return {name: h[: len(rows)].cpu() for name, h in encoded.representations.items()}

    def items(self, ids: np.ndarray, of: Of = "all") -> Tensor:
        """[n] item ids → [n, D] float32; of "content": as for an item never seen; of "id": the row of the table."""
        return self.views(ids)[of]

    def views(self, ids: np.ndarray) -> dict[Of, Tensor]:
        """[n] item ids → what `items` gives for each `of`, [n, D] float32 each."""
        self.check()
        distinct, position = np.unique(self._padded(ids), return_inverse=True)
        encoded = self._encode(self.assembler.items(distinct))
        views: dict[Of, Tensor] = {"all": encoded.items, "content": encoded.content_items, "id": encoded.id_items}
        return {of: vectors.cpu()[torch.from_numpy(position[: len(ids)])] for of, vectors in views.items()}

    def _padded(self, indices: np.ndarray) -> np.ndarray:
        """As many on every rank, filled up with index 0: pooling of sharded tables needs one stride."""
        longest = int(torch.stack(self.comm.all_gather(torch.tensor(len(indices), device=self.comm.device))).max())
        return np.concatenate([indices, np.zeros(longest - len(indices), indices.dtype)])

    def _encode(self, batch: Batch) -> Encoded:
        was_training = self.model.training
        self.model.eval()
        with torch.no_grad():
            _, outputs = self.model(batch.to(self.comm.device))
        self.model.train(was_training)
        return outputs.encoded
