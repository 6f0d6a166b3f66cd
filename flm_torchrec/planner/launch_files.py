"""The launch file of a plan: a torchx command, a script for sbatch, or manifests for Kubernetes, with its numbers."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from flm_torchrec.config import Config
from flm_torchrec.errors import ConfigError
from flm_torchrec.planner.hardware import Cluster

NAME = "flm-pretrain"
PORT = 29400
"""Where the agents of torchrun meet, on the first node."""
IMAGE, CLAIM, WORK = "flm_torchrec:latest", "flm-work", "/work"
"""Of Kubernetes: the image, the volume claim with the folder that `flm plan` was called in, and where it is mounted."""


def torchx(cluster: Cluster, config: Path) -> str:
    """A shell script with one command of torchx; SCHEDULER names another scheduler than slurm."""
    gpus = cluster.per_node if cluster.hardware.device == "cuda" else 0
    numbers = f"--nodes {cluster.nodes} --nproc_per_node {cluster.per_node} --gpu {gpus}"
    component = "launch/components.py:pretrain"
    return (
        "#!/bin/sh\nset -eu\n"
        f'torchx run --scheduler "${{SCHEDULER:-slurm}}" {component} {numbers} -- --config {shlex.quote(str(config))}\n'
    )


def slurm(cluster: Cluster, config: Path) -> str:
    """A script for sbatch: one task a node, which is the agent of the node's ranks."""
    gpus = [f"#SBATCH --gpus-per-node={cluster.per_node}"] if cluster.hardware.device == "cuda" else []
    lines = [
        "#!/bin/bash",
        f"#SBATCH --job-name={NAME}",
        f"#SBATCH --nodes={cluster.nodes}",
        "#SBATCH --ntasks-per-node=1",
        *gpus,
        "#SBATCH --exclusive",
        "set -euo pipefail",
        'head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        f"srun {shlex.join(_torchrun(cluster))} --rdzv_id $SLURM_JOB_ID --rdzv_backend c10d"
        f' --rdzv_endpoint "$head:{PORT}" {shlex.join(_train(config))}',
    ]
    return "\n".join(lines) + "\n"


def in_pods(config: Config, output: Path) -> tuple[Config, Path]:
    """A config and the folder of its plan, their paths as pods have them: relative to the folder that is mounted.

    Raises:
        ConfigError: a path leads out of the folder that `flm plan` was called in.
    """

    def inside(name: str, path: str) -> str:
        found = os.path.relpath(path) if path else path
        if found.partition(os.sep)[0] == os.pardir:
            raise ConfigError(
                f"--emit kubernetes: {name} {path} is not in this folder, which pods mount at {WORK}; put it here"
            )
        return found

    train = config.train
    run, start = inside("train.run", train.run), inside("train.warm_start", train.warm_start)
    return replace(
        config,
        data=replace(config.data, path=inside("data.path", config.data.path)),
        train=replace(train, run=run, warm_start=start),
    ), Path(inside("--output", str(output)))


def kubernetes(cluster: Cluster, config: Path) -> str:
    """A Job with a pod for each node, and the Service by which the pods find the first one."""
    gpus = {"limits": {"nvidia.com/gpu": cluster.per_node}} if cluster.hardware.device == "cuda" else {}
    meet = ["--rdzv_id", NAME, "--rdzv_backend", "c10d", "--rdzv_endpoint", f"{NAME}-0.{NAME}:{PORT}"]
    container = {
        "name": "train",
        "image": IMAGE,
        "workingDir": WORK,
        "command": [*_torchrun(cluster), *meet, *_train(config)],
        "resources": gpus,
        "volumeMounts": [{"name": "work", "mountPath": WORK}, {"name": "shm", "mountPath": "/dev/shm"}],
    }
    pod = {
        "subdomain": NAME,
        "restartPolicy": "Never",
        "containers": [container],
        "volumes": [
            {"name": "work", "persistentVolumeClaim": {"claimName": CLAIM}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
        ],
    }
    labels = {"app": NAME}
    service = {"clusterIP": "None", "selector": labels, "ports": [{"port": PORT}]}
    job = {
        "completions": cluster.nodes,
        "parallelism": cluster.nodes,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "template": {"metadata": {"labels": labels}, "spec": pod},
    }
    manifests: list[dict[str, Any]] = [
        {"apiVersion": "v1", "kind": "Service", "metadata": {"name": NAME}, "spec": service},
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": NAME}, "spec": job},
    ]
    return yaml.safe_dump_all(manifests, sort_keys=False)


LAUNCH_FILES: dict[str, tuple[str, Callable[[Cluster, Path], str]]] = {
    "torchx": ("launch.sh", torchx),
    "slurm": ("launch.sbatch", slurm),
    "kubernetes": ("launch.yaml", kubernetes),
}
"""By name of `--emit`: the file, and what writes it."""


def _torchrun(cluster: Cluster) -> list[str]:
    return ["torchrun", "--nnodes", str(cluster.nodes), "--nproc_per_node", str(cluster.per_node)]


def _train(config: Path) -> list[str]:
    return ["-m", "flm_torchrec", "--", "train", "--config", str(config)]
