"""Rates and sizes of GPUs, each with its source; `assumptions` has the efficiencies of a run.

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


def described_fields(model: object) -> dict[str, FieldInfo]:
    """Return the named numbers of a part; a field's description is its docstring."""
    fields: dict[str, Any] = type(model).__pydantic_fields__  # type: ignore[attr-defined]
    return {name: info for name, info in fields.items() if name != "name"}


def intra_node_fraction(gpus_per_node: int, span: int) -> float:
    """Return the share of a group's bytes that stay within a node."""
    return min(1.0, gpus_per_node / span)


def unit_of(info: FieldInfo) -> str:
    """Return the unit that a field's annotation names, such as "B/s"."""
    return next(mark for mark in info.metadata if isinstance(mark, str))
