"""The identity of a GPU across processes, which number GPUs differently."""

import torch


def gpu_uuid(device: torch.device | int) -> str:
    """Return the UUID of a GPU of this process."""
    return str(torch.cuda.get_device_properties(device).uuid)
