"""How fast `flm recommend --all` is, and in how much memory, beside the bare search of the same vectors.

    python tools/benchmarks/recommend.py --users 1000000 --items 10000 --folder /tmp/bench
    python tools/benchmarks/recommend.py --users 100000 --items 50000 --one-vector --folder /tmp/bench

The export is made up: clusters of normal deviates, one event a user, a fusion that is a mixture of three heads
(`--one-vector`: a dot product). Writing and search each run in a process of their own, which prints the peak of its
memory. The floor is faiss's exact search of the same items, by the heads that score: each part of the users once, with
k + 1 results. Times are processor time and, in brackets, time on the clock.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from export import Alone, MadeUp, made_up_data

from flm_torchrec.config.heads import FUSED
from flm_torchrec.export.manifest import FILE
from flm_torchrec.export.recommend import ExportRecommender, RecommendOptions
from flm_torchrec.export.recommend_file import write_recommendations
from flm_torchrec.export.vectors import decode
from flm_torchrec.export.write import ExportOptions, ExportSource, export
from flm_torchrec.mixture import Mixture

MIXTURE = Mixture((9.0, 14.0, 11.0), (0.5, -1.0, 0.0))
SEARCHED = 10_000
"""Users of the floor; the time for all is in proportion."""


def made_up_export(folder: Path, sizes: tuple[int, int, int], mixture: Mixture | None) -> Path:
    """An export of so many users, items and numbers a vector, kept for the next run."""
    users, items, dim = sizes
    target = folder / f"{users}-{items}-{dim}-{'mixture' if mixture else 'vector'}"
    if (target / FILE).is_file():
        return target
    shutil.rmtree(folder / "data", ignore_errors=True)
    encoder = MadeUp(dim)
    encoder.mixture = mixture
    source = ExportSource(made_up_data(folder / "data", items, users), encoder, np.ones(items, bool), target.name)
    export(source, Alone(), target, replace(ExportOptions(), user_block=8192))
    shutil.rmtree(folder / "data")
    return target


def write(folder: Path, k: int) -> None:
    """Recommendations for all users into a file beside the export; it is removed."""
    recommender = ExportRecommender(folder)
    output = folder.with_suffix(".parquet")
    began = time.process_time(), time.monotonic()
    written = write_recommendations(recommender, output, RecommendOptions(k), overwrite=True)
    _report(folder, began, written.users)
    output.unlink()


def search(folder: Path, k: int) -> None:
    """The bare search of the first users, by the heads that score."""
    recommender = ExportRecommender(folder)
    index = recommender.ranker.exact.index
    heads = recommender.ranker.heads(FUSED)
    part = next(recommender.users.parts(list(heads))).slice(0, SEARCHED)
    queries = [decode(part[head]) for head in heads]
    began = time.process_time(), time.monotonic()
    for one in queries:
        index.search(one, k + 1)
    _report(folder, began, len(part))


def _report(folder: Path, began: tuple[float, float], users: int) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    took = {"cpu": time.process_time() - began[0], "clock": time.monotonic() - began[1], "users": users, "peak": peak}
    (folder / "result.json").write_text(json.dumps(took))


def _apart(function: Callable[[Path, int], None], folder: Path, k: int) -> dict[str, float]:
    process = multiprocessing.get_context("spawn").Process(target=function, args=(folder, k))
    process.start()
    process.join()
    if process.exitcode != 0:
        raise SystemExit(f"{function.__name__} failed; see above")
    return json.loads((folder / "result.json").read_text())


def main(argv: Sequence[str] | None = None) -> None:
    """Make the export, write the recommendations, search alone, and print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--items", type=int, default=10_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("-k", type=int, default=10)
    parser.add_argument("--one-vector", action="store_true", help="the fusion is a dot product, no mixture")
    parser.add_argument("--folder", type=Path, required=True, help="folder for the export, which is kept")
    args = parser.parse_args(argv)
    sizes = (args.users, args.items, args.dim)
    folder = made_up_export(args.folder, sizes, None if args.one_vector else MIXTURE)
    for function in (write, search):
        took = _apart(function, folder, args.k)
        took["cpu"] *= args.users / took["users"]
        took["clock"] *= args.users / took["users"]
        print(
            f"{function.__name__:>6}: {args.users} users, {args.items} items x {args.dim}: {took['cpu']:.1f} s"
            f" ({took['clock']:.1f} s), {args.users / took['clock']:,.0f} users/s, peak {took['peak'] / 1e6:,.0f} MB",
            flush=True,
        )


if __name__ == "__main__":
    main()
