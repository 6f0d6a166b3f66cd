"""Pretraining on a cluster: `torchx run -s slurm launch/components.py:pretrain --nodes 2 -- --config FILE`.

The schedulers are torchx's own: slurm, kubernetes (Volcano), aws_batch. `--dryrun` shows what would be submitted.
"""

import socket

# torchx reads the types of the parameters from the source and knows only typing's old names.
from typing import Dict, List, Optional

from torchx import specs
from torchx.components import dist
from torchx.specs.finder import ComponentValidationException

RANGES = {
    "nodes": (1, 100_000),
    "nproc_per_node": (1, 1024),
    "cpu": (1, 4096),
    "gpu": (0, 1024),
    "memory_gib": (1, 2**20),
    "max_retries": (0, 1000),
    "max_restarts": (0, 1000),
    "rdzv_port": (0, 65535),
}
"""Minimum and maximum of each number that `pretrain` takes."""


def pretrain(
    *script_args: str,
    nodes: int = 1,
    nproc_per_node: int = 8,
    cpu: int = 96,
    gpu: int = 8,
    memory_gib: int = 1000,
    image: str = "flm_torchrec:latest",
    max_retries: int = 0,
    max_restarts: int = 0,
    rdzv_port: int = 0,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
) -> specs.AppDef:
    """Pretrain over nodes; everything after `--` goes to `flm train`.

    Args:
        script_args: options of `flm train`, such as --config
        nodes: machines
        nproc_per_node: ranks on each: one a GPU, or a few on a CPU machine
        cpu: cores of each machine
        gpu: GPUs of each machine; 0 trains on CPUs over gloo
        memory_gib: host memory of each machine in GiB
        image: container image with the package installed (kubernetes, aws_batch); slurm runs in the submitting
            folder
        max_retries: times the scheduler restarts the job after a failure; with --train.existing resume it resumes
        max_restarts: times torchrun restarts all ranks after one failed; they resume from the newest checkpoint
        rdzv_port: port on the first machine where agents meet; 0: a port that is free here, so that two jobs on one
            machine do not meet
        env: environment variables, A=1,B=2
        mounts: type=bind,src=/host,dst=/job and so on, as torchx takes them
    """
    numbers = {
        "nodes": nodes,
        "nproc_per_node": nproc_per_node,
        "cpu": cpu,
        "gpu": gpu,
        "memory_gib": memory_gib,
        "max_retries": max_retries,
        "max_restarts": max_restarts,
        "rdzv_port": rdzv_port,
    }
    _check_numbers(numbers)
    return dist.ddp(
        *script_args,
        m="flm_torchrec.train",
        name="flm-pretrain",
        image=image,
        cpu=cpu,
        gpu=gpu,
        memMB=memory_gib * 1024,
        j=f"{nodes}x{nproc_per_node}",
        # launch/env.sh finds .venv for jobs that start in this folder. An image has no such file: bash ignores that.
        # PET_MAX_RESTARTS sets an option of torchrun that dist.ddp does not offer.
        env={"BASH_ENV": "launch/env.sh", "PET_MAX_RESTARTS": str(max_restarts), **(env or {})},
        max_retries=max_retries,
        rdzv_port=rdzv_port or _free_port(),
        mounts=mounts,
    )


def _check_numbers(numbers: Dict[str, int]) -> None:
    """Refuse numbers out of range, and more ranks than GPUs.

    Raises:
        ComponentValidationException: torchx shows this error as one line, any other as a traceback.
    """
    for name, value in numbers.items():
        low, high = RANGES[name]
        if not low <= value <= high:
            raise ComponentValidationException(f"--{name} {value}: give {low:,} to {high:,}")
    ranks, gpu = numbers["nproc_per_node"], numbers["gpu"]
    if gpu and ranks > gpu:
        raise ComponentValidationException(
            f"--nproc_per_node {ranks} is more than --gpu {gpu}: a rank takes one GPU; lower the first"
        )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
