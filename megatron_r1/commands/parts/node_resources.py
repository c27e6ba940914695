"""What the node of a run has: its GPUs, or a CPU alone, and their free memory."""

import os
import subprocess
from dataclasses import dataclass

from megatron_r1.base.processes.host_memory import free_bytes
from megatron_r1.engines.server import gpu


@dataclass(frozen=True)
class NodeResources:
    """The GPUs and memory of the node of a run.

    Attributes:
        num_gpus: 0 for a CPU.
        free_bytes: free host memory, or that of one GPU."""

    num_gpus: int
    free_bytes: int

    @property
    def is_cpu(self) -> bool:
        """Whether the node has no GPU."""
        return self.num_gpus == 0


def detect_node_resources() -> NodeResources:
    """Return what this node has: its visible GPUs and the bytes of the smallest one's memory, or
    without a GPU the free host memory.

    Raises:
        OSError: nvidia-smi is missing.
        subprocess.CalledProcessError: nvidia-smi fails.
    """
    if not gpu.is_usable():
        return NodeResources(0, free_bytes())
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    sizes_mib = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
    return NodeResources(len(gpu.visible_gpus(os.environ)), min(map(int, sizes_mib)) * 2**20)
