"""SASRec in plain PyTorch, as a good user would write it, for tools/benchmarks/train.py, which starts it.

Sequences padded to the longest of a batch, `nn.TransformerEncoder`, cross-entropy over all items at every
real position, AdamW over one `nn.Embedding`. Kang & McAuley, ICDM 2018, with the loss of later work.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from tools.benchmarks.train_peer import endless, serve, specification

CLIP = 1.0


class SASRec(nn.Module):
    """Items [B, L], with 0 as padding → representations [B, L, D]."""

    def __init__(self, items: int, length: int, dim: int, layers: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.item = nn.Embedding(items + 1, dim, padding_idx=0)
        self.position = nn.Embedding(length, dim)
        nn.init.normal_(self.item.weight, std=0.02)
        nn.init.normal_(self.position.weight, std=0.02)
        block = nn.TransformerEncoderLayer(dim, heads, 4 * dim, dropout, F.gelu, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(block, layers, nn.LayerNorm(dim), enable_nested_tensor=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, items: Tensor) -> Tensor:
        """Items [B, L] → [B, L, D]."""
        length = items.shape[1]
        x = self.item(items) * math.sqrt(self.item.embedding_dim) + self.position.weight[:length]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        return self.encoder(self.dropout(x), mask, is_causal=True)


class Plain:
    """See `train_peer.Trainer`. The file of the spec holds items and offsets of all sequences."""

    def __init__(self, spec: dict) -> None:
        torch.set_num_threads(spec["threads"])
        torch.manual_seed(spec["seed"])
        data = np.load(spec["file"])
        self.bf16 = spec["precision"] == "bf16"
        self.length, self.items = spec["length"], int(data["items"])
        self.model = SASRec(self.items, self.length + 1, spec["dim"], spec["layers"], spec["heads"], spec["dropout"])
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=spec["lr"], weight_decay=0.01)
        train = torch.from_numpy(data["train"]).split(np.diff(data["train_offsets"]).tolist())
        self.valid = torch.from_numpy(data["valid"]).split(np.diff(data["valid_offsets"]).tolist())
        loader: DataLoader = DataLoader(
            train, spec["batch_size"], shuffle=True, collate_fn=lambda part: pad_sequence(part, batch_first=True)
        )
        self.batches = endless(loader)

    def steps(self, count: int) -> tuple[int, int]:
        """Run training steps; the number of sequences and of targets."""
        self.model.train()
        sequences = targets = 0
        for _ in range(count):
            batch = next(self.batches)
            history, wanted = batch[:, :-1], batch[:, 1:]
            real = wanted > 0
            self.optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
                logits = self.model(history)[real] @ self.model.item.weight[1:].T
            loss = F.cross_entropy(logits.float(), wanted[real] - 1)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
            self.optimizer.step()
            sequences, targets = sequences + len(batch), targets + int(real.sum())
        return sequences, targets

    @torch.inference_mode()
    def validate(self) -> float:
        """NDCG@10 of the last item of each sequence, ranked among all items except the earlier ones."""
        self.model.eval()
        gains = []
        for part in DataLoader(self.valid, 512, collate_fn=list):  # type: ignore[arg-type]
            shown = pad_sequence([s[-self.length - 1 : -1] for s in part], batch_first=True)
            last = torch.tensor([min(len(s) - 1, self.length) - 1 for s in part])
            scores = self.model(shown)[torch.arange(len(part)), last] @ self.model.item.weight.T
            own = torch.stack([s[-1] for s in part])[:, None]
            score = scores.gather(1, own)
            scores.scatter_(1, pad_sequence([s[:-1] for s in part], batch_first=True), -torch.inf)  # 0, padding, too
            rank = (scores.scatter(1, own, -torch.inf) >= score).sum(1)
            gains.append(torch.where(rank < 10, 1 / torch.log2(rank + 2.0), 0.0))
        return float(torch.cat(gains).mean())


if __name__ == "__main__":
    serve(Plain(specification()))
