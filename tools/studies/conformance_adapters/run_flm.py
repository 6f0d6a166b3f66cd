"""This project: one training, a list by each head and by their fusion."""

from __future__ import annotations

from pathlib import Path

import flm_torchrec as flm
from flm_torchrec.config.heads import REPRESENTATIONS
from tools.studies.conformance_adapters.prepared import prepared
from tools.studies.conformance_adapters.protocol import K, Task, task_of

CONFIG = Path(__file__).resolve().parents[3] / "configs/synthetic.yaml"


def main(task: Task) -> None:
    """Train on the known events, of which the last two of each user are held out; write the lists."""
    data = prepared(task)
    train = {"seed": task.seed, "trackers": []}
    run = flm.train(data, task.work / "run", config=CONFIG, train=train, distributed={"threads": 1})
    recommender = run.export(task.work / "export", index="flat", tower="none")
    for head in REPRESENTATIONS:
        table = recommender.recommend(task.table("test_users")["user"].to_pylist(), K, head=head)
        lists = table.group_by("user", maintain_order=True).agg("item")
        task.write(head, lists["user"].to_list(), lists["item"].to_list())


if __name__ == "__main__":
    main(task_of())
