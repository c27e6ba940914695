"""Rates and sizes of GPUs, and the assumed efficiencies of a run.

Peaks are the manufacturer's (dense, without sparsity), one direction of a link. H800: an H100 with
NVLink reduced to 400 GB/s, both directions together (DeepSeek-V3 report, arXiv 2412.19437, section
3.1); its nodes have one 400 Gb/s InfiniBand adapter per GPU, which is assumed of the others too.
"""

from dataclasses import dataclass

GIB = 1024**3


@dataclass(frozen=True)
class Hardware:
    """One GPU and its share of a node. Bytes, FLOP/s, bytes/s in one direction."""

    name: str
    memory: float
    bf16: float
    fp8: float
    memory_bandwidth: float
    nvlink: float
    network: float = 50e9
    # PCIe 5.0 x16, 63 GB/s, less an assumed 13% for packet headers.
    host_link: float = 55e9
    # 2 TB a node, as in NVIDIA's DGX H100.
    host_memory: float = 2e12 / 8
    gpus_per_node: int = 8


HARDWARE = {
    hardware.name: hardware
    for hardware in (
        Hardware("H800", 80e9, 989e12, 1979e12, 3.35e12, 200e9),
        Hardware("H100", 80e9, 989e12, 1979e12, 3.35e12, 450e9),
        Hardware("H200", 141e9, 989e12, 1979e12, 4.8e12, 450e9),
        Hardware("B200", 180e9, 2250e12, 4500e12, 7.7e12, 900e9),
    )
}


@dataclass(frozen=True)
class Assumptions:
    """Numbers of the estimate that no table gives; replace them by measurements.

    Where no source is named, the value is a guess: nothing has run on a GPU yet.
    """

    compute_efficiency: float = 0.45
    """Share of the bf16 peak while a stage computes, without bubbles and communication. DeepSeek-V3
    reached 38.9% (causal) of its bf16 peak over whole steps in FP8 (arXiv 2505.09343, table 4)."""
    bandwidth_efficiency: float = 0.6
    """Share of a GPU's memory bandwidth while an engine decodes."""
    link_efficiency: float = 0.75
    """Share of NVLink's and the network's rate in a collective."""
    decode_latency_per_layer: float = 150e-6
    """Least seconds of a decoding step in each layer: two all-to-alls and small kernels, for any
    batch size."""
    reserved: float = 6 * GIB
    """Bytes that a run cannot use: CUDA context, NCCL's buffers, fragmentation."""
    expert_imbalance: float = 1.2
    """Ratio of the fullest rank's tokens to the mean in an expert-parallel group."""
    prompt_tokens: int = 512
    """Mean and longest length of a prompt."""
    response_share: float = 0.25
    """Mean length of a response, as a share of the limit, unless --response-tokens gives it."""
    questions: int = 10_000
    """Of a `sample` run without data.num_train."""

    def __post_init__(self):
        for name in ("compute_efficiency", "bandwidth_efficiency", "link_efficiency"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in (0, 1]")
