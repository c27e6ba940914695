"""The assumed efficiencies and times of a run, each with its source, and the rate of links by them.

They are described as the numbers of `plan.hardware` are, and replaced in the same way by measured
ones."""

from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from megatron_r1.plan.hardware import (
    GIB,
    STRICT_CONFIG,
    ByteRate,
    Bytes,
    Count,
    Fraction,
    Hardware,
    Rate,
    Ratio,
    Seconds,
    Tokens,
    intra_node_fraction,
)


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
    """What a run cannot use of a GPU: CUDA context, NCCL's buffers, fragmentation; a guess. A
    trainer's communicators are counted, and are part of it."""
    communicator: Bytes = 294 << 20
    """A communicator of a trainer's group: 16 channels, two connections each, with the buffers of
    NCCL's three protocols, 4, 4.7 and 0.5 MiB (2.29, init.cc); channels and connections are
    guesses."""
    graph_bytes: Bytes = 16 << 20
    """Memory of an engine's CUDA graph of one size of a pass; a guess."""
    expert_imbalance: Ratio = 1.2
    """The fullest rank's tokens over the mean in an expert-parallel group; a guess."""
    prompt_tokens: Tokens = 512
    """Mean and longest length of a prompt, unless --prompt-tokens gives it; a guess."""
    response_fraction: Fraction = 0.25
    """Mean length of a response over the limit, unless --response-tokens gives it; a guess."""
    questions: Count = 10_000
    """Questions of a `sample` run without data.num_train; a guess."""


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
