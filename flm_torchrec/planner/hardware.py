"""Kinds of nodes from the vendors' data sheets, and clusters of them as the planner's topology."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.types import HardwareConfig, KernelConfig, TopologyFactory, TrainerConfig

from flm_torchrec.config import first_problem
from flm_torchrec.config.schema import STRICT
from flm_torchrec.errors import ConfigError
from flm_torchrec.names import nearest

GIB = 2**30
MOST_RANKS = 4096
"""Planning time grows with the square of the ranks: half a minute on one core for this many."""
MOST = 1e6
"""Maximum of memory in GiB and of bandwidth in 10^9 bytes per second, far above real hardware."""
LEAST = 1e-3
"""Minimum of the same, where they are not 0."""


def _not_tiny(value: float) -> float:
    if 0 < value < LEAST:
        raise ValueError(f"{value} is less than {LEAST}, the least that is planned with")
    return value


Positive = Annotated[float, Field(gt=0, le=MOST), AfterValidator(_not_tiny)]


@dataclass(frozen=True, config=STRICT)
class Hardware:
    """One kind of node. Memory is in GiB. Bandwidths are in one direction, in 10^9 bytes per second."""

    device: Literal["cuda", "cpu"]
    hbm_gib: Annotated[float, Field(ge=0, le=MOST)]
    """Memory of one GPU. The "GB" of HBM in data sheets are binary."""
    host_gib: Positive
    """Host memory of a node, which its ranks share evenly."""
    hbm_gbps: Positive
    """Bandwidth of one GPU's own memory."""
    host_gbps: Positive
    """Bandwidth of a node's host memory, which its ranks share evenly."""
    host_link_gbps: Positive
    """Bandwidth between a GPU and host memory (PCIe), which a look-up in UVM uses."""
    intra_gbps: Positive
    """Bandwidth of one rank to the other ranks of its node."""
    inter_gbps: Positive
    """Share of one rank in the bandwidth of its node's network."""
    per_node: Annotated[int, Field(ge=1, le=MOST_RANKS)]
    """Number of ranks on a node."""
    fp32_tflops: Positive
    """Peak of float32 products, 10^12 FLOP a second: of one GPU, or of a node's processors, which its ranks share."""
    tf32_tflops: Positive
    """The same with inputs rounded to TF32."""
    bf16_tflops: Positive
    """The same with bfloat16 inputs."""


# Peaks: dense products, without sparsity; of TF32 and bfloat16 in the tensor cores, where there are any. Of processors:
# cores x float32 operations a cycle (AVX-512: 32 in Zen 4, 64 in Sapphire Rapids) x base frequency; AMX is not counted.
# The reference node of each GPU is NVIDIA's own DGX, from its data sheet and user guide. The sheets give NVLink and
# PCIe for both directions together: halved here. Network: the compute ports, divided among the GPUs. Host bandwidth:
# sockets x memory channels x transfers x 8 bytes, from the processor's page.
PRESETS: dict[str, Hardware] = {
    # DGX-1 with Tesla V100 SXM2 32 GB: HBM2 900 GB/s, NVLink 300 GB/s, 4 x 100 Gb/s InfiniBand, PCIe 3.0 x16,
    # 512 GB; 2 x Xeon E5-2698 v4 (4 channels, DDR4-2133 there).
    "v100": Hardware("cuda", 32, 512, 900, 136.5, 16, 150, 6.25, 8, 15.7, 15.7, 15.7),
    # DGX A100 640GB: HBM2e 2,039 GB/s, NVLink 600 GB/s, 8 x 200 Gb/s, PCIe 4.0 x16, 2 TB; 2 x EPYC 7742 (8 channels
    # DDR4-3200).
    "a100-80": Hardware("cuda", 80, 2048, 2039, 409.6, 32, 300, 25, 8, 19.5, 156, 312),
    # DGX H100: H100 SXM 80 GB HBM3 3.35 TB/s, NVLink 900 GB/s, 8 x 400 Gb/s, PCIe 5.0 x16, 2 TB; 2 x Xeon 8480C
    # (8 channels DDR5-4800).
    "h100": Hardware("cuda", 80, 2048, 3350, 614.4, 64, 450, 50, 8, 67, 495, 989),
    # DGX H200: H200 SXM 141 GB HBM3e 4.8 TB/s; the rest as DGX H100.
    "h200": Hardware("cuda", 141, 2048, 4800, 614.4, 64, 450, 50, 8, 67, 495, 989),
    # DGX B200: 1,440 GB and 64 TB/s of HBM3e over 8 GPUs, NVLink 1.8 TB/s a GPU, 8 x 400 Gb/s, PCIe 5.0 x16,
    # 2 TB (up to 4); 2 x Xeon 8570 (8 channels DDR5-5600).
    "b200": Hardware("cuda", 180, 2048, 8000, 716.8, 64, 900, 50, 8, 75, 1125, 2250),
    # Two sockets EPYC 9654 (12 channels DDR5-4800 each, three of the four xGMI links of 64 GB/s between them), 24
    # DIMMs of 64 GB, 200 Gb/s. A rank a socket. gloo reaches far less than the link between the sockets.
    "epyc-9654": Hardware("cpu", 0, 1536, 1, 921.6, 1, 192, 12.5, 2, 14.7, 14.7, 14.7),
    # Two sockets Xeon Platinum 8480+ (8 channels DDR5-4800 each, four UPI 2.0 links of 16 GT/s, 2 bytes wide), 16
    # DIMMs of 64 GB, 200 Gb/s. A rank a socket.
    "xeon-8480": Hardware("cpu", 0, 1024, 1, 614.4, 1, 128, 12.5, 2, 14.3, 14.3, 14.3),
}


@dataclass(frozen=True, config=STRICT)
class Cluster:
    """A number of nodes of one kind."""

    name: str
    hardware: Hardware
    nodes: Annotated[int, Field(ge=1)]
    per_node: Annotated[int, Field(ge=1)]

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.nodes * self.per_node

    @property
    def capacity(self) -> int:
        """Bytes of the memory in which a rank looks up: that of its GPU, or its share of the host's."""
        hardware = self.hardware
        own = hardware.hbm_gib if hardware.device == "cuda" else hardware.host_gib / self.per_node
        return int(own * GIB)

    def tflops(self, precision: str) -> float:
        """Peak of a rank's products in a precision of `loss.precision`, in 10^12 FLOP a second."""
        peak: float = getattr(self.hardware, f"{precision}_tflops")
        return peak if self.hardware.device == "cuda" else peak / self.per_node

    def of_size(self, world_size: int) -> Cluster:
        """The same hardware with another number of ranks: a part of one node, or complete nodes."""
        if world_size < self.hardware.per_node:
            return Cluster(self.name, self.hardware, 1, world_size)
        return Cluster(self.name, self.hardware, -(-world_size // self.hardware.per_node), self.hardware.per_node)

    def topology(self) -> Topology:
        """TorchRec's topology; its unit of bandwidth is bytes per millisecond."""
        hardware = self.hardware
        unit = 1e9 / 1e3
        return TopologyFactory.create_topology(
            trainer_config=TrainerConfig(world_size=self.world_size, local_world_size=self.per_node),
            hardware_config=HardwareConfig(
                hbm_cap_bytes=int(hardware.hbm_gib * GIB),
                ddr_cap_bytes=int(hardware.host_gib * GIB / self.per_node),
                ssd_cap_bytes=0,
                intra_host_bw=hardware.intra_gbps * unit,
                inter_host_bw=hardware.inter_gbps * unit,
                hbm_mem_bw=hardware.hbm_gbps * unit,
                ddr_mem_bw=hardware.host_gbps / self.per_node * unit,
                hbm_to_ddr_mem_bw=hardware.host_link_gbps * unit,
            ),
            # Otherwise the planner would use its own constants of bandwidth.
            kernel_config=KernelConfig(compute_device=hardware.device, use_hardware_based_bandwidth=True),
        )

    def describe(self) -> dict[str, Any]:
        """The cluster and its hardware as JSON."""
        hardware = asdict(self.hardware)  # type: ignore[call-overload]
        return {"name": self.name, **hardware, "nodes": self.nodes, "per_node": self.per_node}


def make_cluster(name: str, nodes: int, per_node: int, overrides: Sequence[str] = ()) -> Cluster:
    """A cluster of a preset's hardware, with overrides such as `hbm_gib=96`.

    Args:
        per_node: ranks on a node; 0: as many as the preset has.

    Raises:
        ConfigError: an unknown preset or name, with the nearest known one, or a value that is out of range.
    """
    if name not in PRESETS:
        raise ConfigError(f"--hardware: no preset '{name}'; {nearest(name, PRESETS)}")
    if nodes < 1 or per_node < 0:
        raise ConfigError(f"--nodes {nodes}, --per-node {per_node}: a cluster has at least one node and rank")
    values = asdict(PRESETS[name])  # type: ignore[call-overload]
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ConfigError(f"--set '{override}': write it as NAME=VALUE, such as hbm_gib=96")
        if key not in values:
            raise ConfigError(f"--set: no value '{key}' of hardware; {nearest(key, values)}")
        values[key] = value
    if per_node:
        values["per_node"] = per_node
    try:
        hardware = TypeAdapter(Hardware).validate_python(values)
    except ValidationError as error:
        raise ConfigError(f"--set: {first_problem(error)}") from error
    if hardware.device == "cuda" and hardware.hbm_gib == 0:
        raise ConfigError("--set: hbm_gib: a GPU has memory; give more than 0")
    check_ranks("--nodes", nodes * hardware.per_node)
    return Cluster(name, hardware, nodes, hardware.per_node)


def check_ranks(option: str, ranks: int) -> None:
    """Raise ConfigError for more ranks than can be planned in reasonable time."""
    if ranks > MOST_RANKS:
        raise ConfigError(f"{option}: {ranks:,} ranks; 'flm plan' plans {MOST_RANKS:,} at most")
