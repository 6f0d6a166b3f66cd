"""The label task: whether a user will like an item, predicted from what pretraining learned."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flm_torchrec.config.heads import REPRESENTATIONS
from flm_torchrec.config.schema import LossConfig, ModelConfig
from flm_torchrec.data.batch import Batch
from flm_torchrec.data.schema import Schema
from flm_torchrec.model.dropout import Dropout
from flm_torchrec.model.losses import unused
from flm_torchrec.model.pretrain import Dense, Outputs, PretrainModel
from flm_torchrec.model.rows import Gather
from flm_torchrec.model.space import width
from flm_torchrec.model.tower import Encoded


class LabelDense(Dense):
    """logit of an event = MLP([h_k * v for each representation k before it, h, v]), v the item's vector."""

    def __init__(self, schema: Schema, model: ModelConfig, loss: LossConfig, max_tokens: int, gather: Gather) -> None:
        super().__init__(schema, model, loss, max_tokens, gather)
        dim = width(model.dim)
        self.label_head = nn.Sequential(
            nn.LayerNorm((len(REPRESENTATIONS) + 2) * dim),
            nn.Linear((len(REPRESENTATIONS) + 2) * dim, 2 * dim),
            nn.GELU(),
            Dropout(model.dropout),
            nn.Linear(2 * dim, 1),
        )

    def _result(self, batch: Batch, encoded: Encoded) -> tuple[Tensor, Outputs]:
        items = encoded.items[batch.targets]
        representations = encoded.representations
        joint = torch.cat([*(h * items for h in representations.values()), representations["fused"], items], 1)
        logits = self.label_head(joint).squeeze(1)  # [T]
        labelled = ~torch.isnan(batch.label)
        weight = torch.ones_like(logits) if batch.weight is None else batch.weight
        count = self.gather.all_reduce_sum(weight[labelled].sum())
        count = torch.where(count > 0, count, 1.0)
        summed = F.binary_cross_entropy_with_logits(
            logits[labelled], batch.label[labelled], weight[labelled], reduction="sum"
        )
        loss = summed / count + unused(self.losses)
        outputs = Outputs(encoded, {"label": (summed / count).detach()}, int(labelled.sum()), logits.detach())
        return loss * self.gather.world_size, outputs


class LabelModel(PretrainModel):
    """The pretrained model with a label head instead of the next-item losses; takes the same batches."""

    dense_kind = LabelDense
