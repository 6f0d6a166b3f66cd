"""Estimate against reality on 1, 2 and 4 CPU ranks, and what is sent on up to 1,024: one command.

    python tools/studies/scaling_study.py --output runs/scaling -- data.path=data/synthetic

Plans as `flm plan` does for each number of ranks, trains some steps by that very plan over gloo, and compares the
memory and the bytes sent with what the plan said. Counts bytes and FLOP of the losses by `loss.candidates`. Then plans
the same work per rank for larger clusters, where nothing is measured. Writes study.json, study.md and study.svg. What
stands after `--` are settings.
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

from flm_torchrec.config import Config, load_config
from flm_torchrec.planner.constraints import read_rules
from flm_torchrec.planner.hardware import Cluster, make_cluster
from flm_torchrec.planner.loss_work import KINDS, LossWork
from flm_torchrec.planner.plan import pipeline_of
from flm_torchrec.planner.whatif import Question
from flm_torchrec.training.workload import workload_per_rank

JOB = Path(__file__).with_name("scaling_job.py")
SHARDINGS = ("auto", "row_wise")
COUNTED = ("global", "local")
"""Settings of `loss.candidates` that are counted; on one machine, node is global."""
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
    planned = [*settings, f"distributed.plan={plan}"]
    kinds = COUNTED if sharding == "auto" and ranks > 1 else COUNTED[:1]
    by_kind = {kind: measure(folder, ranks, steps, [*planned, f"loss.candidates={kind}"]) for kind in kinds}
    return {"ranks": ranks, "sharding": sharding, "planned": made, "measured": by_kind[COUNTED[0]], "by_kind": by_kind}


def simulate(last: dict[str, Any], batch: int, given: Sequence[str], hardware: str) -> list[dict[str, Any]]:
    """The work of one rank of the last measured job, planned for more and more ranks of real hardware."""
    config = load_config(None, [*given, f"train.batch_size={batch * last['ranks']}"])
    workload = workload_per_rank(config)(last["ranks"])
    question = Question(lambda _: workload, read_rules(config.distributed, []), pipeline_of("cuda"))
    simulated = []
    for ranks in LARGER:
        made = question.report(make_cluster(hardware, 1, 0).of_size(ranks))
        sent = {"tables": made["sent"]["ids"] + made["sent"]["vectors"], "dense": made["sent"]["dense"]}
        work = loss_work(last["measured"], config, as_counted=False)
        node = min(ranks, make_cluster(hardware, 1, 0).per_node)
        loss = {kind: {"sent": work.sent(kind, ranks, node), "flop": work.flop(kind, ranks, node)} for kind in KINDS}
        told = {name: made[name] for name in ("step_ms", "memory_max")}
        simulated.append({"ranks": ranks, "sent": sent, "loss": loss, **told})
    return simulated


def loss_work(measured: Sequence[dict[str, Any]], config: Config, as_counted: bool) -> LossWork:
    """What the losses of a measured run worked on.

    Args:
        as_counted: with the candidates that were counted, which in a small catalogue are often the same items.
    """
    negatives = config.loss.negatives
    assert negatives != "all"
    shown = _mean(measured, "candidates") if as_counted else None
    return LossWork(config.model.dim, negatives, _mean(measured, "targets"), _mean(measured, "items"), shown)


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
    """Planned and counted bytes that a rank sends in a step for tables and dense part, on average."""
    sent = run["planned"]["sent"]
    cells = []
    for planned, part in ((sent["ids"] + sent["vectors"], "tables"), (sent["dense"], "dense")):
        counted = _sent(run["measured"], part)
        cells += [f"{planned:,.0f}", f"{counted:,.0f}", f"{planned / counted - 1:+.1%}" if counted else ""]
    return [str(run["ranks"]), run["sharding"], *cells]


def loss_rows(run: dict[str, Any], config: Config) -> list[list[str]]:
    """By setting that was counted: bytes that a rank sends for the losses in a step, and FLOP, with the formulas'."""
    ranks, rows = run["ranks"], []
    for kind, measured in run["by_kind"].items():
        work = loss_work(measured, config, as_counted=True)
        cells = [str(ranks), kind]
        for counted, formula in (
            (_sent(measured, "loss"), work.sent(kind, ranks, ranks)),
            (_mean(measured, "loss_flop"), work.flop(kind, ranks, ranks)),
        ):
            cells += [f"{counted:,.0f}", f"{formula:,.0f}", f"{formula / counted - 1:+.1%}" if counted else ""]
        calls = [sum(rank["calls"].values()) for rank in measured]
        loss_calls = [rank["calls"].get("loss", 0) for rank in measured]
        rows.append([*cells, f"{max(loss_calls):.0f}", f"{max(calls):.0f}"])
    return rows


def markdown(runs: Sequence[dict[str, Any]], larger: Sequence[dict[str, Any]], hardware: str, config: Config) -> str:
    """Four tables."""
    memory = ["ranks", "sharding"]
    memory += [f"{part}, {side}" for part in ("weights", "state", "in/out") for side in ("planned", "counted")]
    memory += ["error, all ranks", "error, worst rank", "process grew, MiB"]
    sent = ["ranks", "sharding", "tables, planned", "counted", "error", "dense, planned", "counted", "error"]
    loss = ["ranks", "candidates", "bytes sent, counted", "formula", "error", "FLOP, counted", "formula", "error"]
    loss += ["collectives", "of a step"]
    simulated = ["ranks", "tables", "dense", *(f"loss, {kind}" for kind in KINDS)]
    simulated += [f"GFLOP, {kind}" for kind in KINDS]
    simulated += ["tables' step, ms", "of it communication", "memory, MiB"]
    rows = [
        [
            str(row["ranks"]),
            *(f"{row['sent'][name]:,.0f}" for name in ("tables", "dense")),
            *(f"{row['loss'][kind]['sent']:,.0f}" for kind in KINDS),
            *(f"{row['loss'][kind]['flop'] / 1e9:,.1f}" for kind in KINDS),
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
            "Of the losses, a rank's step on average, counted over gloo:",
            _table(loss, [row for run in runs if run["sharding"] == "auto" for row in loss_rows(run, config)]),
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
    lines = {"tables": [row["sent"]["tables"] for row in larger], "dense": [row["sent"]["dense"] for row in larger]}
    points = {part: [(run["ranks"], _sent(run["measured"], part)) for run in auto] for part in lines}
    for kind in KINDS:
        lines[f"loss, {kind}"] = [row["loss"][kind]["sent"] for row in larger]
        points[f"loss, {kind}"] = [
            (run["ranks"], _sent(run["by_kind"][kind], "loss")) for run in auto if kind in run["by_kind"]
        ]
    for colour, name in enumerate(lines):
        if points[name]:
            axis.plot(*zip(*points[name], strict=True), "o", color=f"C{colour}", label=f"{name}, counted (CPU, gloo)")
        axis.plot([row["ranks"] for row in larger], lines[name], "--", color=f"C{colour}", label=f"{name}, simulated")
    axis.set(xscale="log", yscale="log", xlabel="ranks", ylabel="bytes a rank sends in a step")
    axis.set_xticks([2, 4, *LARGER], [str(n) for n in (2, 4, *LARGER)])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(fontsize="x-small")
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
    text = markdown(runs, larger, args.hardware, load_config(None, args.settings))
    (args.output / "study.md").write_text(text + "\n", encoding="utf-8")
    plot(runs, larger, args.output / "study.svg")
    print(text)


def _mean(measured: Sequence[dict[str, Any]], name: str) -> float:
    return sum(rank[name] for rank in measured) / len(measured)


def _sent(measured: Sequence[dict[str, Any]], part: str) -> float:
    return sum(rank["sent"].get(part, 0.0) for rank in measured) / len(measured)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---:"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
