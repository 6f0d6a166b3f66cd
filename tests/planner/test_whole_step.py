"""Steps as a whole, weak scaling and launch files of `flm plan`: figures checked by hand, files read back."""

from __future__ import annotations

import json
import shlex
import subprocess
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode
from torchx.specs.builders import materialize_appdef

from flm_torchrec import products
from flm_torchrec.cli import main
from flm_torchrec.config import load_config
from flm_torchrec.data.dataset import PreparedData
from flm_torchrec.planner.hardware import make_cluster
from flm_torchrec.planner.launch_files import LAUNCH_FILES
from flm_torchrec.planner.loss_work import KINDS, LossWork
from flm_torchrec.planner.step import PARTS, StepWork, efficiencies, epoch_cost, scaling_ends, step_parts
from flm_torchrec.training import step_work
from flm_torchrec.training.workload import workload_per_rank
from launch.components import pretrain

LOSS = LossWork(dim=64, negatives=2048, targets=640, items=500)
WORK = StepWork(LOSS, "global", "bf16", dense_flop=6.7e9, input_bytes=6.4e6, steps=900)
TABLES = {"total": 0.5, "dense_all_reduce": 0.25}


def test_the_parts_of_a_step_are_bytes_and_flop_over_the_data_sheet() -> None:
    two = make_cluster("h100", 2, 0)
    parts = step_parts(two, TABLES, WORK)
    assert list(parts) == [*PARTS, "total"] and parts["total"] == pytest.approx(sum(parts[name] for name in PARTS))
    assert parts["tables"] == 0.5 and parts["all_reduce"] == 0.25
    assert parts["loss_sent"] == pytest.approx(LOSS.sent("global", 16, 8) / 50e9 * 1e3)
    assert parts["loss_flop"] == pytest.approx(LOSS.flop("global", 16, 8) / 989e12 * 1e3)
    assert parts["dense_flop"] == pytest.approx(6.7e9 / 495e12 * 1e3)  # a softmax in bf16 lets the others be in TF32
    assert parts["input"] == pytest.approx(0.1)  # 6.4 MB over PCIe at 64 GB a second
    node = step_parts(two, TABLES, WORK, "node")
    assert node["loss_sent"] == pytest.approx(LOSS.sent("node", 16, 8) / 450e9 * 1e3)  # it stays inside a node
    assert step_parts(two, TABLES, replace(WORK, precision="tf32"))["dense_flop"] == parts["dense_flop"]
    exact = step_parts(two, TABLES, replace(WORK, precision="fp32"))
    assert exact["dense_flop"] == pytest.approx(0.1)  # 6.7 GFLOP at 67 TFLOP a second
    processor = step_parts(make_cluster("xeon-8480", 1, 4), TABLES, WORK)
    assert processor["input"] == 0 and processor["dense_flop"] == pytest.approx(6.7e9 / (14.3e12 / 4) * 1e3)


def test_an_epoch_is_steps_times_time_and_its_price_is_by_node() -> None:
    two = make_cluster("h100", 2, 0)
    assert epoch_cost(two, WORK, 8.0, None) == {"steps": 900, "seconds": pytest.approx(7.2)}
    assert epoch_cost(two, WORK, 8.0, 30.0)["price"] == pytest.approx(2 * 30 * 7.2 / 3600)


def test_the_setting_at_which_a_cluster_stops_scaling_is_named() -> None:
    clusters = [make_cluster("h100", nodes, 0) for nodes in (1, 2, 4, 16)]
    rows = efficiencies(WORK, [(cluster, TABLES) for cluster in clusters])
    ends = scaling_ends(rows)
    assert [end.split(":")[0] for end in ends] == ["global", "node", "local"]
    assert "stops scaling at 32 ranks" in ends[0] and "what grows: what the losses send" in ends[0]
    assert "scales to 128 ranks" in ends[1] and "scales to 128 ranks" in ends[2]
    at = {(row["candidates"], row["ranks"]): row["efficiency"] for row in rows}
    assert at["global", 8] == at["local", 8] == 1 and at["global", 128] < at["global", 32] < 0.7 < at["local", 128]
    slower = [(cluster, {**TABLES, "total": 0.5 * cluster.nodes}) for cluster in clusters]
    assert "what grows: tables, 0.500 to" in scaling_ends(efficiencies(WORK, slower))[2]
    assert scaling_ends([]) == []


@pytest.mark.parametrize(
    "settings", [["model.block=hstu"], ["model.block=transformer", "model.fusion=gated", "loss.fused=1"]]
)
def test_products_of_the_dense_part_are_those_of_a_real_step(
    settings: list[str], small: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The estimate is three times a forward; here backward is counted too. Layers are wide enough for native code."""
    monkeypatch.setattr(products, "LEAST", 0)
    config = load_config(None, [f"data.path={small.path}", "model.dim=16", "train.batch_size=32", *settings])
    seen: list[Any] = []

    def kept(model: Any, batch: Any) -> int:
        seen.append((model, batch))
        return step_work_flop(model, batch)

    step_work_flop = step_work.dense_flop
    monkeypatch.setattr(step_work, "dense_flop", kept)
    work = workload_per_rank(config)(1).step
    assert work is not None
    (model, batch) = seen[0]
    embedded = step_work._embedded(model, batch)
    for field in fields(embedded):
        getattr(embedded, field.name).requires_grad_(True)
    model.tower.train()
    monkeypatch.setattr(products, "_library", lambda: "not counted")
    with FlopCounterMode(display=False) as counted:
        encoded = model.tower(embedded, batch)
        outputs = [encoded.items, encoded.id_items, encoded.content_items, encoded.left_out]
        sum(x.sum() for x in [*outputs, *encoded.representations.values()]).backward()
    assert work.dense_flop == pytest.approx(counted.get_total_flops(), rel=0.1)
    assert work.loss.targets == pytest.approx(float(torch.tensor([len(batch.targets)])), rel=0.3)
    assert 8 * work.loss.targets < work.input_bytes < 1e6 and work.steps > 1


def plan(small: PreparedData, *options: str) -> list[str]:
    shape = ["--model.dim", "16", "--data.max_history", "8", "--train.batch_size", "64", "--sweep"]
    return ["plan", "--data.path", str(small.path), *shape, *options]


def test_a_plan_tells_the_whole_step_and_is_launched_as_it_is(
    small: PreparedData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "a plan"
    options = ["--hardware", "h100", "--nodes", "2", "--per-node", "4", "--price-per-hour", "36", "--emit", "slurm"]
    assert main(plan(small, *options, "--output", str(output))) == 0
    told = capsys.readouterr().out
    report = json.loads((output / "report.json").read_text())
    whole, epoch = report["report"]["whole_step"], report["epoch"]
    assert whole["ms"]["total"] == pytest.approx(sum(whole["ms"][name] for name in PARTS))
    assert epoch["price"] == pytest.approx(epoch["steps"] * whole["ms"]["total"] / 3.6e6 * 2 * 36)
    assert f"a step of all, nothing hidden, loss.candidates global: {whole['ms']['total']:.3f} ms" in told
    assert "weak scaling, loss.candidates local: " in told and "an epoch: " in told
    assert {row["ranks"] for row in report["weak_scaling"]} == {4, 8, 16, 32, 64, 128}

    config = load_config(output / "config.yaml")
    assert (config.distributed.plan, config.distributed.device) == (str(output / "plan.json"), "cuda")
    assert (config.model.dim, config.data.path) == (16, str(small.path))
    world = json.loads((output / "plan.json").read_text())["world_size"]
    script = (output / "launch.sbatch").read_text()
    assert subprocess.run(["bash", "-n", str(output / "launch.sbatch")]).returncode == 0
    head = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2] for line in script.splitlines() if "#SBATCH" in line
    )
    assert (head["nodes"], head["ntasks-per-node"], head["gpus-per-node"]) == ("2", "1", "4") and world == 8
    words = shlex.split(script.splitlines()[-1])
    assert words[:6] == ["srun", "torchrun", "--nnodes", "2", "--nproc_per_node", "4"]
    assert words[-4:] == ["--", "train", "--config", str(output / "config.yaml")]


def test_pods_find_every_path_below_the_folder_that_they_mount(
    small: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--nodes", "2", "--emit", "kubernetes", "--output", str(tmp_path / "plan")]
    assert main(plan(small, *options)) == 2
    told = f"--emit kubernetes: data.path {small.path} is not in this folder, which pods mount at /work"
    assert told in capsys.readouterr().err and not (tmp_path / "plan").exists()
    (tmp_path / "data").symlink_to(small.path)
    run = ["--data.path", str(tmp_path / "data"), "--train.run", str(tmp_path / "run")]
    assert main(["plan", *run, *options, "--sweep"]) == 0
    config = load_config("plan/config.yaml")
    assert (config.data.path, config.train.run, config.train.warm_start) == ("data", "run", "")
    assert config.distributed.plan == "plan/plan.json"
    _, job = yaml.safe_load_all(Path("plan/launch.yaml").read_text())
    assert job["spec"]["template"]["spec"]["containers"][0]["command"][-1] == "plan/config.yaml"


def test_launch_files_name_the_numbers_of_the_plan(tmp_path: Path) -> None:
    config = tmp_path / "it's" / "config.yaml"
    for cluster in (make_cluster("a100-80", 3, 0), make_cluster("epyc-9654", 1, 0)):
        nodes, ranks, gpus = cluster.nodes, cluster.per_node, 8 if cluster.nodes == 3 else 0
        line = LAUNCH_FILES["torchx"][1](cluster, config).splitlines()[-1]
        words = shlex.split(line)
        assert words[:2] == ["torchx", "run"] and words[-2:] == ["--config", str(config)]
        assert words[4] == "launch/components.py:pretrain"
        app = materialize_appdef(pretrain, words[5:])
        (role,) = app.roles
        command = shlex.split(role.args[-1])  # of a shell
        given = dict(pairwise(command))
        assert (given["--nnodes"], given["--nproc_per_node"]) == (str(nodes), str(ranks))
        assert given["--config"] == str(config)
        assert (role.num_replicas, role.resource.gpu) == (nodes, gpus)

        service, job = yaml.safe_load_all(LAUNCH_FILES["kubernetes"][1](cluster, config))
        assert (service["kind"], job["kind"], service["spec"]["clusterIP"]) == ("Service", "Job", "None")
        spec = job["spec"]
        assert spec["completions"] == spec["parallelism"] == nodes and spec["completionMode"] == "Indexed"
        (container,) = spec["template"]["spec"]["containers"]
        assert container["resources"].get("limits", {}).get("nvidia.com/gpu", 0) == gpus
        assert container["command"][:5] == ["torchrun", "--nnodes", str(nodes), "--nproc_per_node", str(ranks)]
        assert container["command"][-2:] == ["--config", str(config)]
        host = container["command"][container["command"].index("--rdzv_endpoint") + 1].split(":")[0]
        assert host == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
        assert spec["template"]["spec"]["subdomain"] == service["metadata"]["name"]
        assert service["spec"]["selector"] == spec["template"]["metadata"]["labels"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--price-per-hour", "-1"], "--price-per-hour -1.0: give a number from 0"),
        (["--price-per-hour", "nan"], "--price-per-hour nan: give a number from 0"),
        (["--emit", "slurm"], "--emit: writes beside plan.json; name the folder with --output"),
        (["--emit", "slrum", "--output", "x"], "invalid choice: 'slrum'; did you mean 'slurm'?"),
        (["--emit", "torchx", "--spec", "x.yaml"], "--emit: needs a config and its data; leave --spec out"),
        (["--price-per-hour", "3", "--spec", "x.yaml"], "--price-per-hour: needs a config and its data"),
        (["--preset", "fast", "--spec", "x.yaml"], "--spec stands for the model and the data; leave --preset out"),
        (["--set", "fp32_tflops=0"], "fp32_tflops: Input should be greater than 0"),
    ],
)
def test_a_wrong_option_is_one_line(options: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(["plan", *options])
    except SystemExit as ended:
        code = int(ended.code or 0)
    error = capsys.readouterr().err
    assert code == 2 and told in error and error.count("\n") == 1, error


def test_where_every_item_is_a_candidate_only_the_contrast_grows(small: PreparedData) -> None:
    config = load_config(None, [f"data.path={small.path}", "loss.negatives=all", "train.batch_size=32"])
    works = {ranks: workload_per_rank(config)(ranks).step for ranks in (1, 8)}
    for ranks, work in works.items():
        assert work is not None
        loss, items = work.loss, small.schema.items
        for kind in KINDS:
            near = {"global": ranks, "node": 4, "local": 1}[kind]
            contrast = loss.items * min(near * loss.items, items) * 2
            pairs = loss.targets * items * loss.softmaxes + contrast
            assert loss.flop(kind, ranks, 4) == pytest.approx(3 * 2 * loss.dim * pairs)
        # Ranks show each item once.
        rows = loss.sent("local", ranks, 4) / max(1, ranks - 1) / (4 * loss.dim * 4 + 16)
        assert ranks == 1 or rows == pytest.approx(items / ranks, rel=0.01)


def test_fused_vectors_are_twice_as_wide_as_those_of_a_head(small: PreparedData) -> None:
    def softmaxes(*settings: str) -> int:
        work = workload_per_rank(load_config(None, [f"data.path={small.path}", *settings]))(1).step
        assert work is not None
        return work.loss.softmaxes

    assert softmaxes("loss.fused=1") == softmaxes() + 2 == softmaxes("loss.fused=1", "loss.content=0") + 1


def test_clusters_that_do_not_share_managed_tables_evenly_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    recipe = ["--synthetic-users", "100", "--synthetic-items", "160", "--tables", "user_id=zch:80"]
    assert main(["prepare", "--source", "synthetic", *recipe, "--output", str(data)]) == 0
    plan = ["plan", "--data.path", str(data), "--hardware", "h100", "--json"]
    capsys.readouterr()
    assert main([*plan, "--per-node", "5"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["ranks"] for row in told["sweep"]] == [1, 2, 4, 10, 20] and told["smallest"] == 1
    assert all(row["ranks"] in (5, 10, 20, 40) for row in told["weak_scaling"])
    for options in (["--per-node", "3"], ["--sweep", "3"]):
        assert main([*plan, *options]) == 2
        assert "table 'user_id': its 80 managed rows do not divide by 3 ranks" in capsys.readouterr().err
