"""Moves bytes from trainer ranks into an engine rank's memory.

A transport is a `Receiver` and a `Sender` (see base.py), plus one line in TRANSPORTS. Its name
in vLLM is weight-transfer backend `megatron_r1_<name>`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # vLLM reads TRANSPORTS in every process; torch and llvmlite come when needed
    from megatron_r1.push.transports.base import Receiver, Sender

PASSED_BYTES = 64 << 20
"""A bucket that an engine rank passes on; in a round of an exchange each of the set has one."""
ROUNDS_AHEAD = 2
"""Rounds of NCCL that a GPU has enqueued at a time, each with a bucket for either direction."""
TRANSPORTS = {
    "shm": ("shared_memory.SharedMemoryReceiver", "shared_memory.SharedMemorySender"),
    "cuda_ipc": ("shared_memory.DeviceReceiver", "shared_memory.DeviceSender"),
    "gloo": ("gloo.GlooReceiver", "gloo.GlooSender"),
    "nccl": ("nccl.NcclReceiver", "nccl.NcclSender"),
}
"""name -> (receiver, sender), each as module.class"""


def receiver_class(transport: str) -> type[Receiver]:
    """Return the engine rank's end of a transport, imported only now."""
    return _import_class(TRANSPORTS[transport][0])


def sender_class(transport: str) -> type[Sender]:
    """Return the trainer rank's end of a transport, imported only now."""
    return _import_class(TRANSPORTS[transport][1])


def _import_class(path: str) -> Any:
    module, name = path.split(".")
    return getattr(import_module(f"{__name__}.{module}"), name)
