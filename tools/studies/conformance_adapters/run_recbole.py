"""RecBole: SASRec, and factorisation machines (FM) over ids and features.

RecBole holds out the last two known events of each user, and stops by the first of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from tools.studies.conformance_adapters.protocol import K, Task, blocks, histories, task_of

LENGTH = 44
SETTINGS: dict[str, dict[str, Any]] = {
    "SASRec": {
        "MAX_ITEM_LIST_LENGTH": LENGTH,
        "loss_type": "CE",
        "train_neg_sample_args": None,
        "hidden_size": 64,
        "inner_size": 256,
        "n_layers": 2,
        "n_heads": 2,
        "hidden_dropout_prob": 0.2,
        "attn_dropout_prob": 0.2,
        "train_batch_size": 512,
        "eval_step": 1,
    },
    "FM": {
        "embedding_size": 64,
        "train_neg_sample_args": {"distribution": "uniform", "sample_num": 1, "dynamic": False},
        "train_batch_size": 2048,
        "eval_step": 5,
        "load_col": {
            "inter": ["user_id", "item_id", "timestamp"],
            "item": ["item_id", "genre", "brand"],
            "user": ["user_id", "interests"],
        },
    },
}
SHARED = {
    "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
    "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"},
    "learning_rate": 1e-3,
    "metrics": ["NDCG"],
    "topk": [K],
    "valid_metric": f"NDCG@{K}",
    "eval_batch_size": 16_384,
    "epochs": 300,
    "stopping_step": 10,
    "use_gpu": False,
    "save_dataset": False,
    "save_dataloaders": False,
    "log_wandb": False,
    "show_progress": False,
}


class TimeIsUp(Exception):
    """The processor time of training is spent."""


def main(task: Task) -> None:
    """Train the model of the task, and write its lists."""
    _write_atomic(task)
    _train(task, task.model, SETTINGS[task.model])


def _train(task: Task, name: str, settings: dict[str, Any]) -> None:
    # Imported here: RecBole is in an environment of its own.
    import torch
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import get_model, get_trainer, init_seed

    folder = str(task.work)
    here = {"data_path": folder, "checkpoint_dir": folder, "seed": task.seed}
    config = Config(model=name, dataset="known", config_dict={**SHARED, **settings, **here})
    init_seed(config["seed"], config["reproducibility"])
    torch.set_num_threads(1)
    dataset = create_dataset(config)
    train, valid, _ = data_preparation(config, dataset)
    model = get_model(name)(config, train.dataset)
    trainer = get_trainer(config["MODEL_TYPE"], name)(config, model)

    def check(epoch: int, score: float) -> None:
        print(f"{name}: epoch {epoch}, validation {score:.4f}", flush=True)
        if task.spent():
            raise TimeIsUp

    try:
        trainer.fit(train, valid, verbose=False, saved=True, show_progress=False, callback_fn=check)
    except TimeIsUp:
        print(f"{name}: stopped by the limit of processor time", flush=True)
    best = torch.load(trainer.saved_model_file, weights_only=False)
    model.load_state_dict(best["state_dict"])
    _answer(task, name, dataset, model.eval())


def _answer(task: Task, name: str, dataset: Any, model: Any) -> None:
    """Rank all items for each user after all known events, without these."""
    import torch

    known = histories(task)
    items = {token: row for row, token in enumerate(dataset.field2id_token["item_id"]) if row}
    by_row = list(dataset.field2id_token["item_id"])
    lists = []
    for users in blocks(list(known), 64):
        rows = [[items[item] for item in known[user]] for user in users]
        with torch.no_grad():
            scores = _scores(dataset, model, users, rows).view(len(users), -1)
        scores[:, 0] = -torch.inf  # padding
        for place, row in enumerate(rows):
            scores[place, row] = -torch.inf
        lists += [[str(by_row[item]) for item in best] for best in scores.topk(K, 1).indices.tolist()]
    task.write(name, list(known), lists)


def _scores(dataset: Any, model: Any, users: Sequence[str], rows: Sequence[Sequence[int]]) -> Any:
    """[b * items] scores of all items after the histories `rows`."""
    import torch
    from recbole.data.interaction import Interaction

    ids = torch.tensor([dataset.token2id("user_id", user) for user in users])
    if hasattr(model, "ITEM_SEQ"):
        last = [row[-LENGTH:] for row in rows]
        padded = torch.tensor([[*row, *[0] * (LENGTH - len(row))] for row in last])
        lengths = torch.tensor([len(row) for row in last])
        return model.full_sort_predict(Interaction({model.ITEM_SEQ: padded, model.ITEM_SEQ_LEN: lengths}))
    pairs = dataset.join(Interaction({"user_id": ids})).repeat_interleave(dataset.item_num)
    pairs.update(dataset.get_item_feature().repeat(len(users)))
    return model.predict(pairs)


def _write_atomic(task: Task) -> None:
    """The data as atomic files of RecBole."""
    folder = task.work / "known"
    folder.mkdir()
    items, users = (task.table(name).to_pylist() for name in ("items", "users"))
    events = [row for name in ("train", "valid") for row in task.table(name).to_pylist()]

    def write(kind: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        lines = ["\t".join(columns), *("\t".join(map(str, row)) for row in rows)]
        (folder / f"known.{kind}").write_text("\n".join(lines) + "\n")

    events_columns = ("user_id:token", "item_id:token", "timestamp:float")
    write("inter", events_columns, ((e["user"], e["item"], e["timestamp"]) for e in events))
    tokens = ((i["item"], i["genre"], i["brand"].replace(" ", "_")) for i in items)
    write("item", ("item_id:token", "genre:token", "brand:token"), tokens)
    write("user", ("user_id:token", "interests:token_seq"), ((u["user"], " ".join(u["interests"])) for u in users))


if __name__ == "__main__":
    main(task_of())
