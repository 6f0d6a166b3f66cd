"""Fine-tune a pretrained run on growing shares of what can be learnt, beside the same from scratch: table and plot.

    python tools/studies/finetune_study.py --source runs/new-users --output runs/new-users-study \\
        --metrics fused/ndcg@10 --shares 0.01 0.1 1 --seeds 0 1 2 -- --finetune.cohort new --data.split leave-one-out

Options after `--` are those of `flm finetune`. Finished runs are not trained again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from flm_torchrec.tuning.process import FLM

STARTS = {"pretrained": "pretrained, tuned", "found": "pretrained, as it is", "scratch": "from scratch"}

Results = dict[tuple[float, str, str], list[float]]
"""By share, first weights and metric, one value for each seed."""


def run_flm(arguments: Sequence[str], log: Path) -> bool:
    """Run an `flm` command with its output in a file → whether it succeeded."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as output:
        return subprocess.run([*FLM, *arguments], stdout=output, stderr=subprocess.STDOUT).returncode == 0


def execute(folder: Path, arguments: Sequence[str]) -> str | None:
    """One `flm finetune`, unless it is finished → what went wrong, or None."""
    if (folder / "finetune.json").is_file():
        return None
    log = folder.parent / f"{folder.name}.log"
    command = ["finetune", "--train.run", str(folder), "--train.existing", "replace", *arguments]
    return None if run_flm(command, log) else f"{folder}: failed, see {log}"


def collect(folders: dict[tuple[float, int], Path], metrics: Sequence[str]) -> Results:
    """Test metrics of the finished runs.

    Raises:
        KeyError: a run has no such metric.
    """
    results: Results = {}
    for (share, _), folder in folders.items():
        if not (folder / "finetune.json").is_file():
            continue
        test = json.loads((folder / "finetune.json").read_text(encoding="utf-8"))["test"]
        for start in [s for s in STARTS if s in test]:
            for metric in metrics:
                results.setdefault((share, start, metric), []).append(test[start][metric])
    return results


def table(results: Results, shares: Sequence[float], metrics: Sequence[str]) -> str:
    """Markdown, mean ± sample standard deviation over the seeds."""
    lines = [f"| share | weights | seeds | {' | '.join(metrics)} |", "|---|---|---" + "|---" * len(metrics) + "|"]
    for share in shares:
        for start, name in STARTS.items():
            values = [results.get((share, start, metric), []) for metric in metrics]
            if values[0]:
                cells = " | ".join(map(told, values))
                lines.append(f"| {share:.0%} | {name} | {len(values[0])} | {cells} |")
    return "\n".join(lines)


def plot(results: Results, shares: Sequence[float], metrics: Sequence[str], file: Path) -> None:
    """One panel for each metric: share on a logarithmic axis, bars of one standard deviation."""
    figure, axes = plt.subplots(1, len(metrics), figsize=(4.5 * len(metrics), 3.5), squeeze=False, layout="constrained")
    for axis, metric in zip(axes[0], metrics, strict=True):
        for start, name in STARTS.items():
            points = [(s, results[s, start, metric]) for s in shares if (s, start, metric) in results]
            if points:
                spread = [np.std(v, ddof=1) if len(v) > 1 else 0.0 for _, v in points]
                axis.errorbar([s for s, _ in points], [np.mean(v) for _, v in points], spread, marker="o", label=name)
        axis.set(xscale="log", xlabel="share learnt from", title=metric)
        axis.set_xticks(shares, [f"{s:.0%}" for s in shares])
        axis.grid(alpha=0.3)
    axes[0][0].legend()
    figure.savefig(file)


def told(values: Sequence[float]) -> str:
    """Mean over the seeds and, of several, ± the sample standard deviation."""
    spread = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
    return f"{np.mean(values):.4f}{spread}"


def main() -> int:
    """Train what is missing, print the table, write the plot; 1 if a run failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--source", type=Path, required=True, metavar="RUN", help="pretrained run (required)")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the runs (required)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="SVG or PNG (default: DIR/study.svg)")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.01, 0.1, 1.0], help="(default: 0.01 0.1 1)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N", help="(default: 0)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at once (default: 1)")
    parser.add_argument(
        "--metrics", nargs="+", default=["fused/hr@10", "fused/ndcg@10"], help="(default: fused/hr@10 fused/ndcg@10)"
    )
    parser.add_argument("finetune", nargs="*", metavar="-- OPTIONS", help="options of flm finetune")
    args = parser.parse_args()
    folders = {(share, seed): args.output / f"{share:g}-{seed}" for share in args.shares for seed in args.seeds}

    def one(key: tuple[float, int]) -> str | None:
        given = {"--finetune.source": args.source, "--finetune.share": key[0], "--train.seed": key[1]}
        return execute(folders[key], [*(str(x) for pair in given.items() for x in pair), *args.finetune])

    with ThreadPoolExecutor(args.jobs) as pool:
        failures = [f for f in pool.map(one, folders) if f]
    try:
        results = collect(folders, args.metrics)
    except KeyError as error:
        failures.append(f"--metrics: the runs have no {error}")
    else:
        print(table(results, args.shares, args.metrics))
        plot(results, args.shares, args.metrics, args.plot or args.output / "study.svg")
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
