"""The known events as prepared data of this project."""

from __future__ import annotations

import pyarrow as pa

import flm_torchrec as flm
from flm_torchrec.api.data import Prepared
from tools.studies.conformance_adapters.protocol import Task


def prepared(task: Task) -> Prepared:
    """Prepare the known events with all features, in the scratch space."""
    return flm.prepare(
        pa.concat_tables([task.table("train"), task.table("valid")]),
        task.work / "prepared",
        columns={"user": "user", "item": "item", "timestamp": "timestamp"},
        items=task.table("items"),
        item_key="item",
        item_features={"title": "text", "genre": "categorical", "brand": "categorical", "price": "numeric"},
        users=task.table("users"),
        user_key="user",
        user_features={"interests": "multi_categorical", "spending": "numeric"},
        keep_unseen_items=True,
    )
