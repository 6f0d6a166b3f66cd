"""RecTools' SASRec and eSASRec, with its own data set, loader, model and optimizer, for tools/benchmarks/train.py.

eSASRec is SASRec with LiGR blocks and a softmax over the target and 256 items drawn for each position, as published for
Beauty (configs/paper/loo/s3_beauty_ligr.yaml of github.com/blondered/transformer_benchmark), with the sizes of this
benchmark. Both learn from the newest events of a user alone, and pad all sequences to one length.
"""

from __future__ import annotations

from typing import Any

import torch

from tools.benchmarks.train_peer import Validation, endless, serve, specification


class RecTools:
    """See `train_peer.Trainer`."""

    def __init__(self, spec: dict) -> None:
        # Imported here: RecTools is in an environment of its own, and --help must work in ours.
        import pandas as pd
        from pytorch_lightning import Trainer, seed_everything
        from rectools.dataset import Dataset
        from rectools.models import SASRecModel

        torch.set_num_threads(spec["threads"])
        seed_everything(spec["seed"])
        self.valid = Validation(spec["file"])
        order = pd.to_datetime(range(len(self.valid.item)), unit="s")
        events = {"user_id": self.valid.user, "item_id": self.valid.item, "datetime": order, "weight": 1.0}
        self.data = Dataset.construct(pd.DataFrame(events))
        self.model = SASRecModel(
            n_factors=spec["dim"],
            n_blocks=spec["layers"],
            n_heads=spec["heads"],
            dropout_rate=spec["dropout"],
            session_max_len=spec["length"],
            lr=spec["lr"],
            batch_size=spec["batch_size"],
            # Builds the model and the loader, and takes no step.
            get_trainer_func=lambda: Trainer(
                max_epochs=0, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
            ),
            **_published() if spec["model"] == "eSASRec" else {},
        )
        self.model.fit(self.data)
        self.module = self.model.lightning_model
        self.module.on_train_start()
        self.module.trainer = None  # so that a step logs nothing
        self.optimizer = self.module.configure_optimizers()
        self.batches = endless(self.model.data_preparator.get_dataloader_train())

    def steps(self, count: int) -> tuple[int, int]:
        """Steps of RecTools' Lightning module without Lightning's loop, so without its cost."""
        self.module.train()
        sequences = targets = 0
        for number in range(count):
            batch = next(self.batches)
            self.optimizer.zero_grad()
            self.module.training_step(batch, number).backward()
            self.optimizer.step()
            sequences, targets = sequences + len(batch["y"]), targets + int((batch["y"] > 0).sum())
        return sequences, targets

    def validate(self) -> float:
        """NDCG@10 by RecTools' own lists."""
        users = range(len(self.valid.last))
        found = self.model.recommend(users, self.data, k=10, filter_viewed=True)
        hits = found["item_id"].to_numpy() == self.valid.last[found["user_id"].to_numpy()]
        return self.valid.ndcg(found["rank"].to_numpy()[hits])


def _published() -> dict[str, Any]:
    from rectools.models.nn.transformers.ligr import LiGRLayers

    return {
        "transformer_layers_type": LiGRLayers,
        "use_key_padding_mask": True,
        "loss": "sampled_softmax",
        "n_negatives": 256,
    }


if __name__ == "__main__":
    serve(RecTools(specification()))
