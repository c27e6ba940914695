"""The transport over CUDA IPC: trainer ranks write into memory of the engine rank's GPU.

The bytes go over NVLink or within the GPU itself, and nothing passes through the host. Trainer
ranks open the memory through CUDA's inter-process handles; progress and checksums are in /dev/shm,
as those of `shared_memory`."""

import base64

import msgspec
import torch

from megatron_r1.push.transports.base import gpu_uuid
from megatron_r1.push.transports.shared_memory import SharedMemoryReceiver, SharedMemorySender


class DeviceReceiver(SharedMemoryReceiver):
    """A `SharedMemoryReceiver` with its memory on the GPU."""

    def allocate(self) -> torch.Tensor:
        """Return GPU memory for all buffers and publish its handle.

        Raises:
            ValueError: the GPU has too little memory left.
        """
        try:
            memory = torch.empty(self.num_bytes, dtype=torch.uint8, device="cuda")
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"push.transport: cuda_ipc: {self.num_bytes / 2**30:.3g} GiB are needed on the "
                "engine's GPU for weights in transit; lower rollout.gpu_memory, give each engine "
                "more GPUs, or set push.transport: shm"
            ) from error
        self.address = export_ipc_handle(memory)
        return memory


class DeviceSender(SharedMemorySender):
    """A `SharedMemorySender` that writes into memory of the receiver's GPU."""

    def map_memory(self) -> torch.Tensor:
        """Return the receiver's memory, uint8.

        Raises:
            ValueError: this process does not see the receiver's GPU.
        """
        return open_ipc_handle(self.receiver.address)


def export_ipc_handle(memory: torch.Tensor) -> str:
    """Return the address of a tensor on a GPU, with which other processes map its storage."""
    device, *handle = memory.untyped_storage()._share_cuda_()
    # By its UUID, since processes number GPUs differently.
    return base64.b64encode(msgspec.msgpack.encode((gpu_uuid(device), handle))).decode()


def open_ipc_handle(address: str) -> torch.Tensor:
    """Return the storage that another process shares, uint8; it is mapped until the tensor is
    deleted.

    Raises:
        ValueError: this process does not see the other one's GPU.
    """
    gpu, handle = msgspec.msgpack.decode(base64.b64decode(address))
    device_by_uuid = {gpu_uuid(device): device for device in range(torch.cuda.device_count())}
    if gpu not in device_by_uuid:
        raise ValueError(
            f"an engine rank's GPU {gpu} is not one of the {len(device_by_uuid)} that this trainer "
            "rank sees; let every rank see all GPUs of its host (CUDA_VISIBLE_DEVICES)"
        )
    device = torch.device("cuda", device_by_uuid[gpu])
    storage = torch.UntypedStorage._new_shared_cuda(device.index, *handle)
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
