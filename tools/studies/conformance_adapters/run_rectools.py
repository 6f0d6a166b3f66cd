"""RecTools: SASRec of ids, and SASRec whose items also have their genre and brand.

The last known event of each user is validation, by whose loss the best epoch is taken.
"""

from __future__ import annotations

from typing import Any

from tools.studies.conformance_adapters.protocol import K, Task, histories, task_of


def main(task: Task) -> None:
    """Train the model of the task, and write its lists."""
    # Imported here: RecTools is in an environment of its own.
    import pandas as pd

    known = histories(task)
    rows = [(user, item, place) for user, items in known.items() for place, item in enumerate(items)]
    events = pd.DataFrame(rows, columns=["user_id", "item_id", "datetime"]).assign(weight=1.0)
    events["datetime"] = pd.to_datetime(events["datetime"], unit="D")
    if task.model == "SASRec":
        return _train(task, events, None)
    described = task.table("items").to_pandas()
    features = described.melt(id_vars="item", value_vars=["genre", "brand"], var_name="feature")
    _train(task, events, features.rename(columns={"item": "id"}))


def _train(task: Task, events: Any, features: Any) -> None:
    import torch
    from pytorch_lightning import Callback, Trainer, seed_everything
    from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
    from rectools.dataset import Dataset
    from rectools.models import SASRecModel

    class Limit(Callback):
        """Stops training once the processor time is spent."""

        def on_train_batch_end(self, trainer: Any, *of_step: Any) -> None:
            """Ask for the end of training."""
            trainer.should_stop = trainer.should_stop or task.spent()

        def on_validation_end(self, trainer: Any, *of_model: Any) -> None:
            """Tell how far training is."""
            loss = float(trainer.callback_metrics.get(SASRecModel.val_loss_name, float("nan")))
            print(f"{task.model}: epoch {trainer.current_epoch}, validation loss {loss:.4f}", flush=True)

    folder = task.work / "best"
    best = ModelCheckpoint(dirpath=folder, monitor=SASRecModel.val_loss_name, mode="min", save_weights_only=True)
    early = EarlyStopping(monitor=SASRecModel.val_loss_name, mode="min", patience=10)

    def trainer() -> Trainer:
        return Trainer(
            max_epochs=300,
            callbacks=[best, early, Limit()],
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    seed_everything(task.seed, workers=True)
    torch.set_num_threads(1)
    described = {} if features is None else {"item_features_df": features, "cat_item_features": ["genre", "brand"]}
    dataset = Dataset.construct(events, **described)
    model = SASRecModel(
        n_factors=64,
        n_blocks=2,
        n_heads=2,
        session_max_len=44,
        lr=1e-3,
        batch_size=64,
        get_val_mask_func=last_of_each_user,
        get_trainer_func=trainer,
    )
    model.fit(dataset)
    print(f"{task.model}: {model.fit_trainer.current_epoch} epochs", flush=True)
    (weights,) = folder.glob("*.ckpt")
    model.load_weights_from_checkpoint(weights)
    users = list(events["user_id"].unique())
    found = model.recommend(users, dataset, k=K, filter_viewed=True).sort_values(["user_id", "rank"])
    lists = found.groupby("user_id")["item_id"].agg(list)
    task.write(task.model, users, [lists[user] for user in users])


def last_of_each_user(interactions: Any) -> Any:
    """[events] True for the last event of each user: validation."""
    order = interactions.groupby("user_id")["datetime"].rank(method="first", ascending=False)
    return (order <= 1).to_numpy()


if __name__ == "__main__":
    main(task_of())
