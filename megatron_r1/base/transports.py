"""The properties of each transport of pushes, as one table, and the sizes of their buckets. The
code of a transport is a module of `push.transports`.

Configuration, plans and the plugin inside vLLM read this table, so it imports nothing. A new
transport is a row here and its module there."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

BACKEND_PREFIX = "megatron_r1_"
"""A transport's name after this is its backend for vLLM's --weight-transfer-config."""
RELAY_BUCKET_BYTES = 64 << 20
"""A bucket that an engine rank relays; in a round of relays each engine of the set has one."""
ROUNDS_AHEAD = 2
"""Rounds of NCCL that a GPU has enqueued at a time, each with a bucket for either direction."""

PUSH_CHANNELS = {"minCTAs": 8, "maxCTAs": 8, "nvlsCTAs": 1, "nChannelsPerNetPeer": 4}
"""NCCL's limits of a push's communicator, which sends and receives alone. Its buffers for the
network grow with its channels, of which NCCL's own choice is up to 32. A peer has four, as NCCL
counts on 14 GB/s of each; undefined it would have one among as many ranks as a cluster has
(graph/paths.cc of 2.29). NCCL_BUFFSIZE is of a process, and so of the trainer's, too."""


@dataclass(frozen=True)
class Transport:
    """How weights travel from a trainer rank to an engine rank."""

    receiver: str
    """The engine rank's end, as module.class in `push.transports`."""
    sender: str
    """The trainer rank's end, as module.class in `push.transports`."""
    memory: Literal["host", "GPU"]
    """Where an engine rank's receive buffer is."""
    rate: Literal["host_link", "nvlink", "host_network", "network"]
    """The rate into an engine rank that a plan assumes: a field of `plan.hardware.Hardware`."""
    link: str
    """What a plan calls the link of that rate."""
    is_single_node: bool = False
    """Whether trainer ranks write into the memory of engine ranks, which are on the same node."""
    sends_in_rounds: bool = False
    """Whether it is a collective: all ranks send together, in planned rounds, through a
    communicator that refuses two ranks on one GPU."""
    without_gpu: str = ""
    """The transport that stands for this one where there is no GPU; "": it needs none."""

    @property
    def needs_gpu(self) -> bool:
        """Whether its buffers are in GPU memory."""
        return self.memory == "GPU"

    @property
    def exports_gpu_memory(self) -> bool:
        """Whether an engine hands memory of its GPU to other processes."""
        return self.is_single_node and self.memory == "GPU"


TRANSPORTS = {
    "shm": Transport(
        "shared_memory.SharedMemoryReceiver",
        "shared_memory.SharedMemorySender",
        memory="host",
        rate="host_link",
        link="link to the host",
        is_single_node=True,
    ),
    "cuda_ipc": Transport(
        "cuda_ipc.DeviceReceiver",
        "cuda_ipc.DeviceSender",
        memory="GPU",
        rate="nvlink",
        link="NVLink",
        is_single_node=True,
        without_gpu="shm",
    ),
    "gloo": Transport(
        "gloo.GlooReceiver",
        "gloo.GlooSender",
        memory="host",
        rate="host_network",
        link="gloo connection",
    ),
    "nccl": Transport(
        "nccl.NCCLReceiver",
        "nccl.NCCLSender",
        memory="GPU",
        rate="network",
        link="network adapter",
        sends_in_rounds=True,
        without_gpu="gloo",
    ),
}
"""name -> transport; `push.transport` is one of these names."""

ACROSS_NODES = "gloo"
"""The transport that works between any nodes; a plan for several takes it instead of one for one
node."""

if TYPE_CHECKING:
    TransportName = str
else:
    TransportName = Literal[tuple(TRANSPORTS)]
