"""Rates and sizes of GPUs, and the assumed efficiencies of a run, each with its source.

The docstring under a field is what `megatron-r1 plan` prints next to its value; its `--calibrate`
replaces any of them by a measured one, and `preflight` compares a cluster with them. "A guess":
no run on GPUs has measured it."""

from typing import Annotated, Any

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from pydantic.fields import FieldInfo

GIB = 1024**3

STRICT_CONFIG = ConfigDict(strict=True, use_attribute_docstrings=True)
FINITE = Field(gt=0, allow_inf_nan=False)

# The text is the unit, as `Quantity` has it.
Bytes = Annotated[float, FINITE, "B"]
ByteRate = Annotated[float, FINITE, "B/s"]
FlopRate = Annotated[float, FINITE, "FLOP/s"]
Rate = Annotated[float, FINITE, "1/s"]
Seconds = Annotated[float, FINITE, "s"]
Ratio = Annotated[float, FINITE, "x"]
Fraction = Annotated[float, Field(gt=0, le=1), "share"]
Count = Annotated[int, Field(gt=0), ""]
Tokens = Annotated[int, Field(gt=0), "tokens"]


@dataclass(frozen=True, config=STRICT_CONFIG)
class Hardware:
    """One GPU and its share of a node; links in one direction."""

    name: str
    """Its name in `HARDWARE`, as --hardware takes it"""
    memory: Bytes
    """Memory of a GPU as CUDA reports it to programs, in whole GiB; nvidia-smi shows 81,559 MiB of
    an H100, 143,771 of an H200 and 183,359 of a B200."""
    bf16: FlopRate
    """Peak without sparsity; manufacturer."""
    memory_bandwidth: ByteRate
    """Peak; manufacturer."""
    nvlink: ByteRate
    """Manufacturer; H800: arXiv 2412.19437, section 3.1."""
    network: ByteRate = 50e9
    """Rate of a GPU into the network: one 400 Gb/s InfiniBand adapter, as in H800 nodes (arXiv
    2412.19437, section 3.1); a guess for other GPUs."""
    host_network: ByteRate = 1.6e9
    """Rate of a rank over gloo, through host memory and TCP; 1.4 and 1.6 GB/s were measured over
    loopback between two processes, a core each, both sending and receiving (tools/bench push
    --gloo). A node's interface has to carry that of all its GPUs."""
    host_link: ByteRate = 55e9
    """PCIe 5.0 x16, 63 GB/s, less 13% for packet headers, a guess."""
    local_disk: ByteRate = 12e9
    """Sequential rate of a node's local drives, which its GPUs share, in one direction: two PCIe
    4.0 NVMe drives; a guess."""
    host_memory: Bytes = 2e12 / 8
    """Memory of a node, per GPU; 2 TB a node, as in NVIDIA's DGX H100."""
    gpus_per_node: Count = 8
    """GPUs of a node, as in NVIDIA's DGX H100."""


HARDWARE = {
    hardware.name: hardware
    for hardware in (
        Hardware("H800", 79 * GIB, 989e12, 3.35e12, 200e9),
        Hardware("H100", 79 * GIB, 989e12, 3.35e12, 450e9),
        Hardware("H200", 139 * GIB, 989e12, 4.8e12, 450e9),
        Hardware("H20", 95 * GIB, 148e12, 4.0e12, 450e9),
        Hardware("B200", 178 * GIB, 2250e12, 7.7e12, 900e9),
    )
}


@dataclass(frozen=True, config=STRICT_CONFIG)
class Assumptions:
    """Numbers of the estimate that no table gives."""

    compute_efficiency: Fraction = 0.48
    """Share of the bf16 peak while a stage computes, without bubbles and communication; fitted to
    published runs (megatron-r1 plan --published)."""
    fp8_speedup: Ratio = 1.46
    """Rate of FP8 products over that of bf16 ones: DeepGEMM's 1,297 and 1,099 TFLOP/s in both
    products of DeepSeek-V3's experts on H800 (its README of 2025), over the 839 of bf16 ones on an
    H200 (docs/benchmarks/gpu-h200.md); what casts take is not in it."""
    bandwidth_efficiency: Fraction = 0.38
    """Share of the memory bandwidth while an engine decodes; fitted to published runs."""
    link_efficiency: Fraction = 0.78
    """Share of NVLink's and the network's rate in a collective; fitted to published runs."""
    push_efficiency: Fraction = 0.75
    """Share of the rate of the link into an engine GPU during a push; a guess."""
    store_requests: Rate = 25e3
    """Requests per second of one TCPStore; 24,000 to 44,000 were measured with 1 to 4 clients on 2
    CPU cores (docs/learned.md)."""
    store_bytes: ByteRate = 1e9
    """Out of one TCPStore, whose server is one thread, and of a broadcast to all trainer ranks; a
    guess."""
    group_seconds: Seconds = 1.36
    """Time to create an NCCL group, besides `group_rank_seconds` for each of its ranks: 2.04 s for
    8 ranks, 4.06 s for 32 (nccl#534)."""
    group_rank_seconds: Seconds = 0.084
    """Time per rank of an NCCL group that is created (nccl#534)."""
    set_plan_seconds: Seconds = 2.0
    """Time of a trainer rank to plan a push: 1.3 s of one core for DeepSeek-V3 to 16 x 128 GPUs,
    and the decoding of what it reads."""
    round_seconds: Seconds = 50e-6
    """Launch of an all-gather of what engines pass on; a guess."""
    hop_seconds: Seconds = 21e-6
    """Per hop of its ring: 10 us, and 0.5 MB of filling at the adapter's rate; a guess."""
    gradients_exposed: Fraction = 0.5
    """Share of the data axis's traffic that does not overlap: the reduce-scatter overlaps the last
    micro-batches, the all-gather does not; a guess."""
    decode_latency_per_layer: Seconds = 230e-6
    """Least time of a decoding step in each layer of an engine of several GPUs, for any batch,
    without its exchanges: small kernels; fitted to published runs."""
    eager_latency_per_layer: Seconds = 1e-3
    """What `enforce_eager` (no CUDA graphs) adds to it: some hundred launches of 10 us by the
    host; a guess."""
    pass_seconds: Seconds = 5e-3
    """What a pass of an engine takes besides its layers, while its GPUs wait: scheduling, inputs,
    sampling and outputs. 5 to 6 ms between two passes of 256 sequences (vllm#10634), 4 to 13 before
    (vllm#6854); a guess for smaller batches and newer versions, which do some of it meanwhile."""
    host_stall_seconds: Seconds = 200e-6
    """A wait of the host for the device, which is idle until new kernels arrive: for the counts of
    a layer's tokens by expert, where the host does not know them (models/token_dispatcher.py), and
    in DeepEP's dispatch in high throughput. Plain Megatron-Core, which published runs use, also
    waits for the counts of recomputed layers and, by default, after each send or receive between
    pipeline stages (p2p_communication.py, batch_p2p_sync); a guess."""
    sleep_seconds: Seconds = 1.0
    """Time in which an engine frees its memory; a guess."""
    wake_seconds: Seconds = 2.6
    """Time in which it gets it back: the longest of 0.8 to 2.6 s, after level 2 (vLLM's blog,
    2025-10-26)."""
    tensor_load_seconds: Seconds = 1e-4
    """Host's work for each tensor that an engine loads, besides its bytes; a guess."""
    storage: ByteRate = 0.25e9
    """Rate of a rank into the storage of checkpoints, all ranks at once; a guess (2 GB/s a
    node)."""
    draft_acceptance: Fraction = 0.85
    """Share of right tokens among those that an MTP layer drafts behind right ones: "between 85%
    and 90%" for DeepSeek-V3's second token (arXiv 2412.19437, section 5.4.3). A guess for later
    tokens, at temperature 1, and after RL with frozen MTP layers."""
    time_spread: Annotated[float, Field(ge=1, le=2), "x"] = 1.96
    """Ends of an estimated time's range: it over this, and times this; from the spread of the
    published runs that calibrate, at most 2."""
    reserved: Bytes = 6 * GIB
    """What a run cannot use of a GPU: CUDA context, NCCL's buffers, fragmentation; a guess."""
    expert_imbalance: Ratio = 1.2
    """The fullest rank's tokens over the mean in an expert-parallel group; a guess."""
    prompt_tokens: Tokens = 512
    """Mean and longest length of a prompt, unless --prompt-tokens gives it; a guess."""
    response_fraction: Fraction = 0.25
    """Mean length of a response over the limit, unless --response-tokens gives it; a guess."""
    questions: Count = 10_000
    """Questions of a `sample` run without data.num_train; a guess."""


def described_fields(model: object) -> dict[str, FieldInfo]:
    """Return the named numbers of a part; a field's description is its docstring."""
    fields: dict[str, Any] = type(model).__pydantic_fields__  # type: ignore[attr-defined]
    return {name: info for name, info in fields.items() if name != "name"}


def link_rate(hardware: Hardware, assumptions: Assumptions, span: int) -> float:
    """Return the assumed bytes per second that a rank sends in a group's collective.

    A group wider than a node sends the part that leaves it through the network, concurrently with
    the rest through NVLink.

    Args:
        hardware: the GPU and its links.
        assumptions: with the efficiency of links.
        span: ranks from the first to the last of the group.
    """
    node_fraction = intra_node_fraction(hardware.gpus_per_node, span)
    time_per_byte = max(node_fraction / hardware.nvlink, (1 - node_fraction) / hardware.network)
    return assumptions.link_efficiency / time_per_byte


def intra_node_fraction(gpus_per_node: int, span: int) -> float:
    """Return the share of a group's bytes that stay within a node."""
    return min(1.0, gpus_per_node / span)


def unit_of(info: FieldInfo) -> str:
    """Return the unit that a field's annotation names, such as "B/s"."""
    return next(mark for mark in info.metadata if isinstance(mark, str))
