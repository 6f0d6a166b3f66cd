"""The label task: whether a user will like, click or buy an item, predicted from what pretraining learned."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flm_torchrec.config.heads import REPRESENTATIONS
from flm_torchrec.config.schema import LossConfig, ModelConfig
from flm_torchrec.data.batch import Batch
from flm_torchrec.data.schema import Schema
from flm_torchrec.model.dropout import Dropout
from flm_torchrec.model.losses import unused
from flm_torchrec.model.pretrain import Dense, Outputs
from flm_torchrec.model.rows import Gather
from flm_torchrec.model.space import width
from flm_torchrec.model.tower import Encoded


class LabelDense(Dense):
    """The pretrained model's dense part with label heads in place of the next-item losses; takes the same batches.

    logit of a label = MLP([h_k * v for each representation k before the event, h, v]), v the event's item. The loss is
    the sum over the labels of weight_k x mean over the labelled events, by their weights, of the cross entropy.

    Args:
        labels: by name, in the order of the labels of a batch, the weight of its loss.
    """

    def __init__(
        self,
        schema: Schema,
        model: ModelConfig,
        loss: LossConfig,
        max_tokens: int,
        gather: Gather,
        labels: Mapping[str, float] = MappingProxyType({"value": 1.0}),
    ) -> None:
        super().__init__(schema, model, loss, max_tokens, gather)
        self.tower.learns_fused = True
        self.label_weights = dict(labels)
        first, *others = (_label_head(width(model.dim), model.dropout) for _ in labels)
        self.label_head = first
        self.other_label_heads = nn.ModuleList(others)

    def _result(self, batch: Batch, encoded: Encoded) -> tuple[Tensor, Outputs]:
        items = encoded.items[batch.targets]
        representations = encoded.representations
        joint = torch.cat([*(h * items for h in representations.values()), representations["fused"], items], 1)
        logits = torch.cat([head(joint) for head in (self.label_head, *self.other_label_heads)], 1)  # [T, labels]
        labelled = ~torch.isnan(batch.label)
        weight = torch.ones_like(logits[:, 0]) if batch.weight is None else batch.weight
        counts = self.gather.all_reduce_sum((weight[:, None] * labelled).sum(0))  # [labels]
        total, losses = unused(self.losses), {}
        for number, (name, of_label) in enumerate(self.label_weights.items()):
            own, count = labelled[:, number], torch.where(counts[number] > 0, counts[number], 1.0)
            summed = F.binary_cross_entropy_with_logits(
                logits[own, number], batch.label[own, number], weight[own], reduction="sum"
            )
            total = total + of_label * (summed / count)
            losses["label" if len(counts) == 1 else f"label/{name}"] = (summed / count).detach()
        outputs = Outputs(encoded, losses, int(labelled.any(1).sum()), logits.detach())
        return total * self.gather.world_size, outputs


def _label_head(dim: int, dropout: float) -> nn.Sequential:
    inputs = (len(REPRESENTATIONS) + 2) * dim
    return nn.Sequential(
        nn.LayerNorm(inputs), nn.Linear(inputs, 2 * dim), nn.GELU(), Dropout(dropout), nn.Linear(2 * dim, 1)
    )
