"""`flm plan`: what a cluster would hold and how fast it would be, with no GPU."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flm_torchrec.config import Config, add_config_arguments, config_from_arguments, given_overrides, to_yaml
from flm_torchrec.errors import ConfigError
from flm_torchrec.files import write_text
from flm_torchrec.folders import CONFIG

if TYPE_CHECKING:
    from flm_torchrec.planner.hardware import Cluster
    from flm_torchrec.planner.show import TextTable
    from flm_torchrec.planner.whatif import Question
    from flm_torchrec.planner.workload import Workload

PIPELINES = {"none": "none", "sparse-dist": "train_sparse_dist", "prefetch": "train_prefetch_sparse_dist"}


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `plan` to the subcommands."""
    parser = subparsers.add_parser(
        "plan",
        help="plan the tables over a cluster that need not be there: memory, step time, what fits",
        description="Plan the tables over a cluster that need not be there. From a config and its prepared data (the"
        " settings below), or from --spec, a bare list of tables. Says what each rank would hold and how long the"
        " tables' part of a step would take, the smallest cluster that fits, and what would make it fit.",
        allow_abbrev=False,
    )
    parser.add_argument("--spec", metavar="FILE", help="YAML of tables, instead of a config (configs/plans)")
    parser.add_argument("--hardware", default="h100", help="v100, a100-80, h100, h200, b200, epyc-9654, xeon-8480")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        dest="values",
        help="a value of the hardware, such as hbm_gib=96; may be repeated",
    )
    parser.add_argument("--nodes", type=int, default=1, help="nodes (default: 1; 4,096 ranks in all at most)")
    parser.add_argument("--per-node", type=int, default=0, help="ranks of a node (default: those of the hardware)")
    parser.add_argument(
        "--kernels",
        nargs="+",
        default=["fused"],
        metavar="KERNEL",
        help="fused (device memory; default), fused_uvm_caching, fused_uvm (host memory)",
    )
    parser.add_argument("--pipeline", choices=PIPELINES, help="input pipeline (default: as training does there)")
    parser.add_argument("--sweep", nargs="*", type=int, metavar="RANKS", help="other numbers of ranks to plan for")
    parser.add_argument(
        "--output", metavar="DIR", help="write plan.json, report.json, report.txt and report.html there"
    )
    parser.add_argument(
        "--price-per-hour",
        type=float,
        metavar="PRICE",
        help="of a node: also tell the price of an epoch (default: none)",
    )
    parser.add_argument(
        "--emit",
        choices=("torchx", "slurm", "kubernetes"),
        help="write the launch file of this very plan to --output too: launch.sh, launch.sbatch or launch.yaml, with"
        " config.yaml",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--diff", nargs=2, metavar="PLAN", help="only say what differs between two plan.json")
    add_config_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Plan the tables over a cluster and print or write the report, or compare two plans.

    Raises:
        ConfigError: an option is wrong, or the tables do not fit; in the second case after the report.
    """
    _check(args)
    if args.diff:
        return _diff(Path(args.diff[0]), Path(args.diff[1]))
    # Imported here: PyTorch takes seconds, and a wrong option should be reported at once.
    from flm_torchrec.distributed.comm import silence_warnings
    from flm_torchrec.planner.hardware import make_cluster
    from flm_torchrec.planner.show import remedy_table, summary, sweep_table, tables_of
    from flm_torchrec.planner.solve import DENSE, Infeasible
    from flm_torchrec.planner.whatif import remedies, smallest, sweep

    silence_warnings()
    launched = _launched(args) if args.emit else None
    cluster = make_cluster(args.hardware, args.nodes, args.per_node, args.values)
    question = _question(args, cluster)
    least = smallest(question, cluster)
    sizes = _sizes(args, question, cluster, least)
    report: dict[str, Any] = {"smallest": least, "sweep": sweep(question, cluster, sizes)}
    failed: Infeasible | None = None
    try:
        report["report"] = question.report(cluster)
        lines, tables = summary(report["report"]), tables_of(report["report"])
        _add_whole_steps(args, question, cluster, report, (lines, tables))
    except Infeasible as error:
        failed, tried = error, [] if error.table == DENSE else remedies(question, cluster)
        report.update(table=error.table, gap=error.gap, error=str(error), remedies=[asdict(r) for r in tried])
        lines, tables = [f"does not fit: {error}"], [remedy_table(tried)] if tried else []
    lines.append(
        f"smallest {cluster.name} cluster that fits: {least} ranks ({cluster.of_size(least).nodes} nodes)"
        if least
        else "no cluster of 1,024 ranks or fewer fits"
    )
    if report["sweep"]:
        tables.append(sweep_table(report["sweep"]))
    _print_and_write(args, report, lines, tables)
    if launched and not failed:
        _emit(args, cluster, *launched)
    if failed:
        raise ConfigError(str(failed))


def _check(args: argparse.Namespace) -> None:
    """Raise ConfigError for options that contradict each other."""
    price = args.price_per_hour
    if price is not None and not 0 <= price < float("inf"):
        raise ConfigError(f"--price-per-hour {price}: give a number from 0")
    for option, given in (("--price-per-hour", price is not None), ("--emit", bool(args.emit))):
        if given and (args.spec or args.diff):
            raise ConfigError(f"{option}: needs a config and its data; leave {'--spec' if args.spec else '--diff'} out")
    if args.emit and not args.output:
        raise ConfigError("--emit: writes beside plan.json; name the folder with --output")


def _add_whole_steps(
    args: argparse.Namespace,
    question: Question,
    cluster: Cluster,
    report: dict[str, Any],
    shown: tuple[list[str], list[TextTable]],
) -> None:
    """Add what a step costs beside the tables to the report and to the lines and tables shown, if it is known."""
    from flm_torchrec.planner.show import epoch_line, weak_table
    from flm_torchrec.planner.step import epoch_cost, scaling_ends
    from flm_torchrec.planner.whatif import weak_scaling

    work = question.workload(cluster.world_size).step
    if work is None:
        return
    lines, tables = shown
    report["epoch"] = epoch_cost(cluster, work, report["report"]["whole_step"]["ms"]["total"], args.price_per_hour)
    report["weak_scaling"] = weak_scaling(question, cluster)
    lines.append(epoch_line(report["epoch"]))
    lines += [f"weak scaling, loss.candidates {line}" for line in scaling_ends(report["weak_scaling"])]
    tables.append(weak_table(report["weak_scaling"]))


def _launched(args: argparse.Namespace) -> tuple[Config, Path]:
    """The config that is launched, and the folder of its plan, with the paths that the job sees."""
    from flm_torchrec.planner.launch_files import in_pods

    config, folder = config_from_arguments(args), Path(args.output)
    return in_pods(config, folder) if args.emit == "kubernetes" else (config, folder)


def _emit(args: argparse.Namespace, cluster: Cluster, config: Config, seen: Path) -> None:
    """Write the config of the plan, and the file that launches it.

    Args:
        seen: the folder of the plan, where the job finds it.
    """
    from flm_torchrec.planner.launch_files import LAUNCH_FILES

    folder = Path(args.output)
    own = replace(config.distributed, plan=str(seen / "plan.json"), device=cluster.hardware.device)
    name, written = LAUNCH_FILES[args.emit]
    write_text(folder / CONFIG, to_yaml(replace(config, distributed=own)))
    write_text(folder / name, written(cluster, seen / CONFIG))
    if not args.json:
        print(f"{folder / name}: {cluster.nodes} nodes, {cluster.per_node} ranks each, {folder / 'plan.json'}")


def _question(args: argparse.Namespace, cluster: Cluster) -> Question:
    from torchrec.distributed.types import PipelineType

    from flm_torchrec.names import nearest
    from flm_torchrec.planner.constraints import KERNELS, read_rules, table_configs
    from flm_torchrec.planner.plan import pipeline_of
    from flm_torchrec.planner.whatif import Question

    config = config_from_arguments(args)
    if config.distributed.plan:
        raise ConfigError("distributed.plan: 'flm plan' makes a plan; leave it out, or compare two plans with --diff")
    if config.distributed.replicas > 1:
        raise ConfigError("distributed.replicas: 'flm plan' plans one replica; leave it out, and give the nodes of one")
    if config.distributed.memory_gib:
        raise ConfigError("distributed.memory_gib: give it as the hardware's, with --set hbm_gib=N or host_gib=N")
    for kernel in args.kernels:
        if kernel not in KERNELS:
            raise ConfigError(f"--kernels: no kernel '{kernel}'; {nearest(kernel, KERNELS)}")
    if args.spec:
        from flm_torchrec.planner.spec import read_spec, workload_of_spec

        own = ("distributed.collectives",)  # the spec says it
        other = [n for n in given_overrides(args) if not n.startswith("distributed.") or n.startswith(own)]
        other += [f"--{name}" for name in ("config", "preset") if getattr(args, name)]
        if other:
            raise ConfigError(f"--spec stands for the model and the data; leave {other[0]} out")
        fixed = workload_of_spec(read_spec(Path(args.spec)))
        workload: Callable[[int], Workload] = lambda _: fixed  # noqa: E731
    else:
        from flm_torchrec.training.workload import workload_per_rank

        workload = cache(workload_per_rank(config))
    names = [table.name for table in table_configs(workload(cluster.world_size).model)]
    rules = replace(read_rules(config.distributed, names), kernels=tuple(args.kernels))
    pipeline = PipelineType(PIPELINES[args.pipeline]) if args.pipeline else pipeline_of(cluster.hardware.device)
    return Question(workload, rules, pipeline)


def _sizes(args: argparse.Namespace, question: Question, cluster: Cluster, least: int | None) -> list[int]:
    """The numbers of ranks of --sweep, or powers of two from the smallest that fits to eight times the cluster."""
    from flm_torchrec.planner.hardware import check_ranks
    from flm_torchrec.planner.whatif import sharing_evenly

    if args.sweep is not None:
        if any(size < 1 for size in args.sweep):
            raise ConfigError("--sweep: a number of ranks is at least 1")
        for size in args.sweep:
            check_ranks("--sweep", cluster.of_size(size).world_size)
        return sorted(args.sweep)
    doubling = [2**n for n in range(11)]
    most = 8 * max(cluster.world_size, least or 1)
    sizes = [size for size in doubling if (least or 1) <= 2 * size and size <= min(most, 1024)]
    return sharing_evenly(question, cluster, sizes)


def _print_and_write(
    args: argparse.Namespace, report: dict[str, Any], lines: list[str], tables: list[TextTable]
) -> None:
    from flm_torchrec.planner.show import html, text

    as_json, as_text = json.dumps(report, indent=2) + "\n", text(lines, tables)
    print(as_json if args.json else as_text, end="")
    if not args.output:
        return
    folder = Path(args.output)
    files = {"report.json": as_json, "report.txt": as_text, "report.html": html(lines, tables, report["sweep"])}
    if "report" in report:
        files["plan.json"] = json.dumps(report["report"]["plan"], indent=2)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_text(folder / name, content)
    except OSError as error:
        raise ConfigError(f"--output: {folder}: {error.strerror}") from error


def _diff(one: Path, other: Path) -> None:
    from flm_torchrec.planner.plan_file import differences, read_plan

    differing = differences(read_plan(one), read_plan(other))
    for what, left, right in differing:
        print(f"{what}: {left} -> {right}")
    if not differing:
        print("the plans are the same")
