"""How much memory and time an export takes as the catalogue grows, beside writing the same bytes and no more.

    python -m tools.benchmarks.export --items 1000000 10000000 --dim 64 --index none --output /tmp/bench

Each size is exported by a process of its own, from an encoder that makes vectors up (clusters of normal deviates),
block by block: what remains is the export's own. "peak" is its resident memory, "held" that without pages of mapped
files. The floor writes bytes as many as the export's to one file on the same disk and takes
their sha256, in the same process. The last line is the growth of the peak per million items.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from flm_torchrec.config.heads import REPRESENTATIONS
from flm_torchrec.data.dataset import EntityFeatures, PreparedData
from flm_torchrec.data.schema import Feature, Schema
from flm_torchrec.evaluation.protocol import Of
from flm_torchrec.export.index import INDEX
from flm_torchrec.export.manifest import IndexKind, Quantise, Storage
from flm_torchrec.export.write import ExportOptions, ExportSource, export
from flm_torchrec.files import sha256
from flm_torchrec.mixture import Mixture
from tools.benchmarks.memory import PERIOD, held_by

USERS = 2_000
BRANDS = 1_000
CLUSTERS = 4_096
GROUP = 131_072
"""Rows of a row group of the made-up catalogue."""
FLOOR_BYTES = 4 << 30


class Alone:
    """A single process."""

    rank, world_size = 0, 1
    device = torch.device("cpu")

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """As of `Collectives`."""
        return [tensor]

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """As of `Collectives`."""
        return tensor.clone()

    def exchange(self, parts: list[Tensor], sizes: list[int]) -> list[Tensor]:
        """As of `Collectives`."""
        return parts


class MadeUp:
    """Vectors of norm 1 around random centres, the same for the same ids."""

    growth = 0
    mixture: Mixture | None = None

    def __init__(self, dim: int) -> None:
        self.dim, self.mixture = dim, None
        self.centres = torch.randn(CLUSTERS, dim, generator=torch.Generator().manual_seed(0))

    def users(self, rows: np.ndarray) -> dict[str, Tensor]:
        """[b] → by head, [b, D]."""
        return {head: self._around(rows, seed + 1) for seed, head in enumerate(REPRESENTATIONS)}

    def items(self, ids: np.ndarray, of: Of = "all") -> Tensor:
        """[n] ids → [n, D]."""
        return self.views(ids)[of]

    def views(self, ids: np.ndarray) -> dict[Of, Tensor]:
        """[n] ids → by kind, the same [n, D]."""
        vectors = self._around(ids, 0)
        return {"all": vectors, "content": vectors, "id": vectors}

    def _around(self, ids: np.ndarray, seed: int) -> Tensor:
        first = int(ids[0]) if len(ids) else 0
        drawn = torch.Generator().manual_seed(first * len(REPRESENTATIONS) * 2 + seed)
        noise = torch.randn(len(ids), self.dim, generator=drawn)
        centre = self.centres[torch.from_numpy(ids * 2_654_435_761 % CLUSTERS)]
        return torch.nn.functional.normalize(centre + noise, dim=1)


def made_up_data(folder: Path, items: int, users: int = USERS, events: int = 1) -> PreparedData:
    """Prepared items with a key, a title and a brand each, written a row group at a time; few events of each user."""
    (folder / "vocab").mkdir(parents=True)
    brands = pa.table({"code": pa.array(range(BRANDS), pa.int32()), "value": [f"brand {b}" for b in range(BRANDS)]})
    pq.write_table(brands, folder / "vocab" / "item_brand.parquet")
    writer = None
    for start in range(0, items, GROUP):
        ids = np.arange(start, min(start + GROUP, items))
        text = pa.array(ids).cast(pa.string())
        table = pa.table({"item_id": ids, "item_key": text, "title": text, "brand": (ids % BRANDS).astype(np.int32)})
        writer = writer or pq.ParquetWriter(folder / "items.parquet", table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()
    ids = np.arange(users)
    pq.write_table(pa.table({"user_id": ids, "user_key": pa.array(ids).cast(pa.string())}), folder / "users.parquet")
    nothing = EntityFeatures({}, np.zeros((0, 0), np.float32))
    brand = Feature("brand", "item", "categorical", "brand", "item_brand", BRANDS)
    return PreparedData(
        path=folder,
        schema=Schema("made-up", "made-up", users, items, users, title="title", features=(brand,)),
        offsets=np.arange(users + 1) * events,
        item=np.arange(users * events) * 7919 % items,
        timestamp=np.tile(np.arange(events), users),
        event=np.zeros(users * events, np.int32),
        value=np.ones(users * events, np.float32),
        segment=None,
        items=nothing,
        users=nothing,
    )


def measure(folder: Path, items: int, dim: int, options: ExportOptions) -> None:
    """Export once and leave what it took in `folder`/result.json."""
    torch.set_num_threads(1)
    data = made_up_data(folder / "data", items)
    source = ExportSource(data, MadeUp(dim), np.ones(items, bool), "made-up")
    before = _peak()
    began = time.monotonic()
    manifest = export(source, Alone(), folder / "export", options)
    seconds = time.monotonic() - began
    assert manifest is not None
    written = sum(f.stat().st_size for f in (folder / "export").rglob("*") if f.is_file())
    index = (folder / "export" / INDEX).stat().st_size if manifest.index else 0
    result = {
        "items": items,
        "seconds": seconds,
        "before": before,
        "peak": _peak(),
        "written": written,
        "index": index,
        "floor": _floor(folder / "floor", written),
        "recall": min(r["@100"] for r in manifest.index.recall.values()) if manifest.index else None,
        "parameters": manifest.index.parameters if manifest.index else None,
    }
    (folder / "result.json").write_text(json.dumps(result))


def _peak() -> int:
    """Bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _floor(file: Path, size: int) -> float:
    """Seconds to write as many bytes and to take their digest; beyond FLOOR_BYTES by proportion."""
    block = np.random.default_rng(0).bytes(1 << 24)
    tried = min(size, FLOOR_BYTES)
    began = time.monotonic()
    with file.open("wb") as stream:
        for start in range(0, tried, len(block)):
            stream.write(block[: tried - start])
    sha256(file)
    seconds = time.monotonic() - began
    file.unlink()
    return seconds * size / tried


def main(argv: Sequence[str] | None = None) -> None:
    """Export each size in a process of its own, and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--index", choices=get_args(IndexKind), default="none")
    parser.add_argument("--quantise", choices=get_args(Quantise), default="none")
    parser.add_argument("--format", choices=get_args(Storage), default="parquet")
    parser.add_argument("--output", type=Path, required=True, help="folder to work in; what it makes there is removed")
    args = parser.parse_args(argv)
    options = ExportOptions(args.format, args.quantise, args.index)
    found = []
    for items in args.items:
        folder = args.output / f"bench-{items}"
        shutil.rmtree(folder, ignore_errors=True)
        process = multiprocessing.get_context("spawn").Process(target=measure, args=(folder, items, args.dim, options))
        process.start()
        held = 0
        while process.exitcode is None:
            held = max(held, held_by(process.pid or 0))
            process.join(PERIOD)
        if process.exitcode != 0:
            raise SystemExit(f"the export of {items} items failed; see above")
        r = json.loads((folder / "result.json").read_text())
        shutil.rmtree(folder)
        found.append(r)
        line = f"{items:>11,} items x {args.dim}: {r['seconds']:7.1f} s, {items / r['seconds']:>9,.0f} items/s,"
        line += f" {r['seconds'] / r['floor']:.1f} x the floor; {r['written'] / 1e9:.2f} GB written"
        line += f"; peak {r['peak'] / 1e6:,.0f} MB, {r['before'] / 1e6:,.0f} before it; held {held / 1e6:,.0f}"
        line += f", {r['index'] / 1e6:,.0f} the index" if r["index"] else ""
        print(line + (f"; recall@100 {r['recall']:.4f}, {r['parameters']}" if r["index"] else ""), flush=True)
    if len(found) > 1:
        grown = (found[-1]["peak"] - found[-1]["index"]) - (found[0]["peak"] - found[0]["index"])
        print(f"peak less the index grows by {grown / (found[-1]['items'] - found[0]['items']):.2f} bytes an item")


if __name__ == "__main__":
    main()
