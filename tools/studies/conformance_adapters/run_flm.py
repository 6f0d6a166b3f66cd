"""This project: one training, a list by each head and by their fusion."""

from __future__ import annotations

from typing import Any

import flm_torchrec as flm
from flm_torchrec.config.heads import REPRESENTATIONS
from tools.studies.conformance_adapters.prepared import prepared
from tools.studies.conformance_adapters.protocol import K, Task, task_of

SETTINGS: dict[str, dict[str, Any]] = {
    "model": {"dim": 128, "layers": 0, "embedding_dropout": 0.1, "id_dropout": 0},
    "loss": {"negatives": "all"},
    "train": {"epochs": 3, "batch_size": 64, "trackers": []},
    "eval": {"ks": [10]},
    "distributed": {"threads": 1},
}
"""Those of configs/synthetic.yaml."""


def main(task: Task) -> None:
    """Train on the known events, of which the last two of each user are held out; write the lists."""
    data = prepared(task)
    train = {**SETTINGS["train"], "seed": task.seed}
    others = {name: section for name, section in SETTINGS.items() if name != "train"}
    run = flm.train(data, task.work / "run", config=None, preset=None, train=train, **others)
    recommender = run.export(task.work / "export", index="flat", tower="none")
    for head in REPRESENTATIONS:
        table = recommender.recommend(task.table("test_users")["user"].to_pylist(), K, head=head)
        lists = table.group_by("user", maintain_order=True).agg("item")
        task.write(head, lists["user"].to_list(), lists["item"].to_list())


if __name__ == "__main__":
    main(task_of())
