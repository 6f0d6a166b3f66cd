"""Pretraining on a cluster: `torchx run -s slurm launch/components.py:pretrain --nodes 2 -- --config FILE`.

The schedulers are torchx's own: slurm, kubernetes (Volcano), aws_batch. `--dryrun` shows what would be submitted.
"""

# torchx reads the types of the parameters from the source and knows only typing's old names.
from typing import Dict, List, Optional

from torchx import specs
from torchx.components import dist


def pretrain(
    *script_args: str,
    nodes: int = 1,
    nproc_per_node: int = 8,
    cpu: int = 96,
    gpu: int = 8,
    memory_gib: int = 1000,
    image: str = "flm_torchrec:latest",
    max_retries: int = 0,
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
        max_retries: times the scheduler starts the job anew after a failure
        env: environment variables, A=1,B=2
        mounts: type=bind,src=/host,dst=/job and so on, as torchx takes them
    """
    if gpu and nproc_per_node > gpu:
        raise ValueError(f"--nproc_per_node {nproc_per_node} is more than --gpu {gpu}: a rank takes one GPU")
    return dist.ddp(
        *script_args,
        m="flm_torchrec.train",
        name="flm-pretrain",
        image=image,
        cpu=cpu,
        gpu=gpu,
        memMB=memory_gib * 1024,
        j=f"{nodes}x{nproc_per_node}",
        env=dict(env or {}),
        max_retries=max_retries,
        mounts=mounts,
    )
