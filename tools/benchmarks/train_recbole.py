"""RecBole's SASRec, with its own data set, loader, model and optimizer, for tools/benchmarks/train.py, which starts it.

RecBole makes n - 1 sequences of a user with n events, each a prefix with one target, and pads all to one length.
"""

from __future__ import annotations

import torch

from tools.benchmarks.train_peer import endless, serve, specification


class RecBole:
    """See `train_peer.Trainer`. The folder of the spec holds NAME/NAME.inter, an atomic file of RecBole."""

    def __init__(self, spec: dict) -> None:
        # Imported here: RecBole is in an environment of its own, and --help must work in ours.
        from recbole.config import Config
        from recbole.data import create_dataset, data_preparation
        from recbole.utils import get_model, get_trainer, init_seed

        settings = {
            "data_path": spec["folder"],
            "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
            "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"},
            "MAX_ITEM_LIST_LENGTH": spec["length"],
            "train_batch_size": spec["batch_size"],
            "train_neg_sample_args": None,  # cross-entropy over all items
            "loss_type": "CE",
            "hidden_size": spec["dim"],
            "inner_size": 4 * spec["dim"],
            "n_layers": spec["layers"],
            "n_heads": spec["heads"],
            "hidden_dropout_prob": spec["dropout"],
            "attn_dropout_prob": spec["dropout"],
            "learning_rate": spec["lr"],
            "metrics": ["NDCG"],
            "topk": [10],
            "valid_metric": "NDCG@10",
            "eval_batch_size": 4096,
            "seed": spec["seed"],
            "use_gpu": False,
            "save_dataset": False,
            "save_dataloaders": False,
            "checkpoint_dir": spec["folder"],
            "log_wandb": False,
        }
        config = Config(model="SASRec", dataset="bench", config_dict=settings)
        init_seed(config["seed"], config["reproducibility"])
        torch.set_num_threads(spec["threads"])
        self.train, self.valid, _ = data_preparation(config, create_dataset(config))
        self.model = get_model("SASRec")(config, self.train._dataset)
        self.trainer = get_trainer(config["MODEL_TYPE"], "SASRec")(config, self.model)
        self.trainer.eval_collector.data_collect(self.train)
        self.batches = endless(self.train)

    def steps(self, count: int) -> tuple[int, int]:
        """The body of RecBole's own epoch (`Trainer._train_epoch`), for as many steps as asked for."""
        self.model.train()
        learnt = 0
        for _ in range(count):
            interaction = next(self.batches)
            self.trainer.optimizer.zero_grad()
            loss = self.model.calculate_loss(interaction)
            self.trainer._check_nan(loss)
            loss.backward()
            self.trainer.optimizer.step()
            learnt += len(interaction)
        return learnt, learnt

    def validate(self) -> float:
        """NDCG@10 by RecBole's own evaluation."""
        return float(self.trainer.evaluate(self.valid, load_best_model=False)["ndcg@10"])


if __name__ == "__main__":
    serve(RecBole(specification()))
