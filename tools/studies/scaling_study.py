"""Estimate against reality on 1, 2 and 4 CPU ranks, and what is sent on up to 1,024: one command.

    python tools/studies/scaling_study.py --output runs/scaling -- data.path=data/synthetic

Plans as `flm plan` does for each number of ranks, trains some steps by that very plan over gloo, and compares the
memory and the bytes sent with what the plan said; then plans the same work per rank for larger clusters, where
nothing is measured. Writes study.json, study.md and study.svg. What stands after `--` are settings.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from flm_torchrec.config import load_config
from flm_torchrec.planner.constraints import read_rules
from flm_torchrec.planner.hardware import Cluster, make_cluster
from flm_torchrec.planner.plan import pipeline_of
from flm_torchrec.planner.whatif import Question
from flm_torchrec.training.workload import workload_per_rank

JOB = Path(__file__).with_name("scaling_job.py")
SHARDINGS = ("auto", "row_wise")
TABLE_COLLECTIVES = ("alltoall_base_", "_allgather_base_", "_reduce_scatter_base_", "reduce_scatter_")
LOSS_COLLECTIVES = ("allgather_", "allreduce_")
LARGER = (8, 16, 32, 64, 128, 256, 512, 1024)


def measure(folder: Path, ranks: int, steps: int, settings: Sequence[str]) -> list[dict[str, Any]]:
    """What each rank of a real job measured.

    Raises:
        RuntimeError: the job failed, with the end of what it said.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", str(port)]
    command = [sys.executable, "-W", "ignore", *launcher, str(JOB), str(folder), str(steps), *settings]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{folder}: the job failed\n{done.stderr[-3000:]}")
    return [json.loads((folder / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in range(ranks)]


def measure_and_plan(
    folder: Path, ranks: int, sharding: str, batch: int, steps: int, given: Sequence[str]
) -> dict[str, Any]:
    """One plan, what it says of each rank and what each rank measured."""
    folder = folder / f"{ranks}-{sharding}"
    settings = [
        *given,
        f"train.batch_size={batch * ranks}",
        "distributed.device=cpu",
        f"distributed.sharding={sharding}",
    ]
    config = load_config(None, settings)
    cluster = Cluster("this machine", make_cluster("epyc-9654", 1, 0).hardware, 1, ranks)
    rules = read_rules(config.distributed, [])
    made = Question(workload_per_rank(config), rules, pipeline_of("cpu")).report(cluster)
    folder.mkdir(parents=True, exist_ok=True)
    plan = folder / "plan.json"
    plan.write_text(json.dumps(made["plan"]), encoding="utf-8")
    measured = measure(folder, ranks, steps, [*settings, f"distributed.plan={plan}"])
    return {"ranks": ranks, "sharding": sharding, "planned": made, "measured": measured}


def simulate(last: dict[str, Any], batch: int, given: Sequence[str], hardware: str) -> list[dict[str, Any]]:
    """The work of one rank of the last measured job, planned for more and more ranks of real hardware."""
    config = load_config(None, [*given, f"train.batch_size={batch * last['ranks']}"])
    workload = workload_per_rank(config)(last["ranks"])
    question = Question(lambda _: workload, read_rules(config.distributed, []), pipeline_of("cuda"))
    simulated = []
    for ranks in LARGER:
        made = question.report(make_cluster(hardware, 1, 0).of_size(ranks))
        sent = {"tables": made["sent"]["ids"] + made["sent"]["vectors"], "dense": made["sent"]["dense"]}
        sent["loss"] = loss_bytes(last, ranks)
        simulated.append({"ranks": ranks, "sent": sent, "step_ms": made["step_ms"], "memory_max": made["memory_max"]})
    return simulated


def loss_bytes(run: dict[str, Any], ranks: int) -> float:
    """What a rank sends for the candidates of the softmax and of the contrast, all ranks' being seen by each.

    Forward gathers C candidates (vector, id, two log-probabilities) and M targets (two vectors, id) of each rank;
    backward sums the gradients of all ranks' vectors over the ranks.
    """
    candidates, targets = _mean(run, "candidates"), _mean(run, "targets")
    vector = 4 * run["planned"]["tables"][0]["dim"]
    gathered = (ranks - 1) * (candidates * (vector + 16) + targets * (2 * vector + 8))
    return gathered + 2 * (ranks - 1) * vector * (candidates + 2 * targets)


def memory_row(run: dict[str, Any]) -> list[str]:
    """Planned and measured bytes of the tables' part: over all ranks, and on the rank that is furthest off."""
    planned_bytes, counted_bytes = [], []
    for planned, measured in zip(run["planned"]["ranks"], run["measured"], strict=True):
        planned_bytes.append([planned["device"][part] for part in ("weights", "optimizer", "input_output")])
        passing = measured["input"] + measured["lengths"] + measured["output"]
        counted_bytes.append([measured["weights"], measured["optimizer"], passing])
    errors = [sum(one) / sum(other) - 1 for one, other in zip(planned_bytes, counted_bytes, strict=True)]
    pairs = zip(map(sum, zip(*planned_bytes, strict=True)), map(sum, zip(*counted_bytes, strict=True)), strict=True)
    cells = [f"{amount:,.0f}" for pair in pairs for amount in pair]
    mean = sum(map(sum, planned_bytes)) / sum(map(sum, counted_bytes)) - 1
    growth = max(rank["process_growth"] for rank in run["measured"]) / 2**20
    shown = [f"{mean:+.1%}", f"{max(errors, key=abs):+.1%}", f"{growth:.0f}"]
    return [str(run["ranks"]), run["sharding"], *cells, *shown]


def sent_row(run: dict[str, Any]) -> list[str]:
    """Planned and counted bytes that a rank sends in a step, on average."""
    sent = run["planned"]["sent"]
    tables = sum(_sent(run, name) for name in TABLE_COLLECTIVES)
    others = sum(_sent(run, name) for name in LOSS_COLLECTIVES)
    cells = []
    for planned, counted in (
        (sent["ids"] + sent["vectors"], tables),
        (sent["dense"] + loss_bytes(run, run["ranks"]), others),
    ):
        cells += [f"{planned:,.0f}", f"{counted:,.0f}", f"{planned / counted - 1:+.1%}" if counted else ""]
    return [str(run["ranks"]), run["sharding"], *cells]


def markdown(runs: Sequence[dict[str, Any]], larger: Sequence[dict[str, Any]], hardware: str) -> str:
    """Three tables."""
    memory = ["ranks", "sharding"]
    memory += [f"{part}, {side}" for part in ("weights", "state", "in/out") for side in ("planned", "counted")]
    memory += ["error, all ranks", "error, worst rank", "process grew, MiB"]
    sent = ["ranks", "sharding", "tables, planned", "counted", "error", "dense and loss, planned", "counted", "error"]
    simulated = ["ranks", "tables", "dense", "loss", "tables' step, ms", "of it communication", "memory, MiB"]
    rows = [
        [
            str(row["ranks"]),
            *(f"{row['sent'][name]:,.0f}" for name in ("tables", "dense", "loss")),
            *(f"{row['step_ms'][part]:.3f}" for part in ("total", "communication")),
            f"{row['memory_max'] / 2**20:.1f}",
        ]
        for row in larger
    ]
    return "\n\n".join(
        [
            "Memory of the tables' part, bytes, all ranks together, measured over gloo:",
            _table(memory, [memory_row(run) for run in runs]),
            "Bytes a rank sends in a step, on average, counted over gloo:",
            _table(sent, [sent_row(run) for run in runs if run["ranks"] > 1]),
            f"Simulated on the planner's topology of {hardware}, the same work per rank, nothing measured; bytes a rank"
            " sends in a step:",
            _table(simulated, rows),
        ]
    )


def plot(runs: Sequence[dict[str, Any]], larger: Sequence[dict[str, Any]], file: Path) -> None:
    """Bytes sent over ranks: counted as points, from the formulas as lines."""
    plt.rcParams["svg.hashsalt"] = "flm"
    figure, axis = plt.subplots(figsize=(7, 4))
    auto = [run for run in runs if run["sharding"] == "auto" and run["ranks"] > 1]
    kinds = {"tables": TABLE_COLLECTIVES, "dense and loss": LOSS_COLLECTIVES}
    for colour, (name, collectives) in zip(("C0", "C1"), kinds.items(), strict=True):
        points = [sum(_sent(run, kind) for kind in collectives) for run in auto]
        axis.plot([run["ranks"] for run in auto], points, "o", color=colour, label=f"{name}, counted (CPU, gloo)")
        parts = ("tables",) if name == "tables" else ("dense", "loss")
        values = [sum(row["sent"][part] for part in parts) for row in larger]
        axis.plot([row["ranks"] for row in larger], values, "--", color=colour, label=f"{name}, simulated")
    axis.set(xscale="log", yscale="log", xlabel="ranks", ylabel="bytes a rank sends in a step")
    axis.set_xticks([2, 4, *LARGER], [str(n) for n in (2, 4, *LARGER)])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(file, metadata={"Date": None}, bbox_inches="tight")


def main() -> None:
    """Measure, simulate, and write the study."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the study and its runs")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="numbers of ranks to measure")
    parser.add_argument("--batch", type=int, default=64, help="sequences per rank")
    parser.add_argument("--steps", type=int, default=10, help="steps to count over")
    parser.add_argument("--hardware", default="h100", help="of the simulated clusters")
    parser.add_argument("settings", nargs="*", help="after --: settings as section.field=value")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    runs = []
    for ranks in args.ranks:
        for sharding in SHARDINGS if ranks > 1 else SHARDINGS[:1]:
            print(f"{ranks} ranks, {sharding}", file=sys.stderr)
            runs.append(measure_and_plan(args.output, ranks, sharding, args.batch, args.steps, args.settings))
    larger = simulate(runs[-1], args.batch, args.settings, args.hardware)
    (args.output / "study.json").write_text(json.dumps({"runs": runs, "larger": larger}, indent=2), encoding="utf-8")
    text = markdown(runs, larger, args.hardware)
    (args.output / "study.md").write_text(text + "\n", encoding="utf-8")
    plot(runs, larger, args.output / "study.svg")
    print(text)


def _mean(run: dict[str, Any], name: str) -> float:
    return sum(rank[name] for rank in run["measured"]) / len(run["measured"])


def _sent(run: dict[str, Any], name: str) -> float:
    return sum(rank["sent"].get(name, 0.0) for rank in run["measured"]) / len(run["measured"])


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---:"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
