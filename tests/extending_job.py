"""Run by tests/test_extending.py with the extended package: prepares, trains, exports, loads, in the current folder."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path

import numpy as np

import flm_torchrec
from flm_torchrec.cli.main import main
from flm_torchrec.errors import RunError
from flm_torchrec.export.manifest import load_manifest
from flm_torchrec.export.parts import ExportRows
from flm_torchrec.export.stores.load import load, opened
from flm_torchrec.export.vectors import decode

assert Path(flm_torchrec.__file__).is_relative_to(Path.cwd())


def flm(*words: str) -> str:
    """Standard output of a command."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(list(words)) == 0, words
    return out.getvalue()


flm("prepare", "--source", "movielens-1m", "--input", "ml-1m", "--output", "data")
flm(
    "train", "--data.path", "data", "--train.run", "run", "--train.max_steps", "4", "--train.batch_size", "16",
    "--train.log_every", "1", "--train.eval_every", "2", "--model.dim", "8", "--model.layers", "1",
    "--loss.negatives", "16", "--loss.agreement", "0.1", "--distributed.device", "cpu",
    "--distributed.sharding", "row_wise", "--distributed.whole_below", sys.argv[1],
)  # fmt: skip
flm("export", "--run", "run", "--output", "export", "--index", "none")
said = json.loads(flm("recommend", "--export", "export", "--user", "7", "--head", "basket", "-k", "3", "--json"))

manifest = load_manifest(Path("export"))
items = ExportRows(Path("export"), manifest, "items").table()
query = decode(ExportRows(Path("export"), manifest, "users").table(["basket"])["basket"])[0]
scores = decode(items["embedding"]) @ query
keys = items["item_key"].to_pylist()

loaded = [load(Path("export"), "duckdb:items.db", "items") for _ in range(2)]
with opened("duckdb:items.db", "items") as store:
    found = [key for key, _ in store.search(query, 5)]
    store.delete([keys[0], "nobody's"])
    after_delete = store.count()
try:
    with opened("duckdb:items.db", "items") as store:
        store.create(manifest.dim + 1)
    refused = ""
except RunError as error:
    refused = str(error)

tables = json.loads(Path("run/plan.json").read_text())["tables"]
result = {
    "items": len(keys),
    "loaded": [[one.upserted, one.deleted, one.total] for one in loaded],
    "found": found,
    "best": [keys[i] for i in np.argsort(-scores)[:5]],
    "recommended": len(said),
    "after_delete": after_delete,
    "refused": refused,
    "types": {name: table["sharding_type"] for name, table in tables.items()},
    "rows": {name: max(s["offset"][0] + s["size"][0] for s in table["shards"]) for name, table in tables.items()},
}
print(json.dumps(result))
