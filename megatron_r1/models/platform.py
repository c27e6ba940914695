"""The platform of this process: whether it computes on a CPU or a GPU, and how Megatron-Core and
torch.distributed are made to run there.

`prepare_process()` is called once in a trainer process, before anything imports Megatron-Core. It
refuses another version of Megatron than the tested one. On a GPU it only chooses the device; on a
CPU it installs `cpu_patches`, so that the same unmodified Megatron trains over gloo. No other file
replaces a function of Megatron or torch for the whole process because of a CPU. Code that has to
choose between two settings or two layers calls `has_gpu()` or `uses_transformer_engine()`.

Processes that run transformers or vLLM must not call `prepare_process()`: both choose their device
by `torch.cuda`, whose patched functions would mislead them."""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from datetime import timedelta
from importlib import import_module, metadata
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.base.processes.process_memory import keep_freed_memory, without_garbage_collection
from megatron_r1.models.cpu_patches import CPU_DEVICE, PATCHES
from megatron_r1.models.rendezvous_store import trainer_store

MEGATRON_VERSION = "0.19.2"
"""The version whose lines are patched (`models.cpu_patches`, `models.patches`)."""
TRANSFORMER_ENGINE_VERSION = "2.20.2"
"""The version in requirements/cuda.lock, with which names, shapes and checkpoints are tested."""


def _check_megatron() -> None:
    """Raise UserError for another Megatron-Core than the tested one: lines of it are patched, and
    the weight tables have its names."""
    installed_version = metadata.version("megatron-core")
    if installed_version != MEGATRON_VERSION:
        raise UserError(
            f"megatron-core {installed_version} is installed, and this code is written against "
            f"{MEGATRON_VERSION}: pip install --no-deps --ignore-requires-python "
            f"megatron-core=={MEGATRON_VERSION}",
            key="megatron-core",
            cause=Cause.CONFLICT,
        )


def warn_of_transformer_engine() -> None:
    """Warn of another Transformer Engine than the tested one: images bring their own."""
    try:
        installed_version = metadata.version("transformer-engine")
    except metadata.PackageNotFoundError:  # built from a source folder without metadata
        return
    # An image's own build has the commit behind a plus sign.
    if installed_version.partition("+")[0] != TRANSFORMER_ENGINE_VERSION:
        warnings.warn(
            f"transformer-engine {installed_version} is installed, and "
            f"{TRANSFORMER_ENGINE_VERSION} is tested (requirements/cuda.lock); names and "
            "checkpoints of its layers may differ",
            stacklevel=2,
        )


_REAL_CUDA = torch.cuda.is_available()
_prepared = False


def has_gpu() -> bool:
    """Whether this process trains on CUDA. The answer is the real driver's, also after patching."""
    return _REAL_CUDA


def device() -> torch.device:
    """Return the device of this process's parameters and batches."""
    return torch.device("cuda", torch.cuda.current_device()) if _REAL_CUDA else CPU_DEVICE


def distributed_backend() -> str:
    """Return the torch.distributed backend that carries this device's tensors."""
    return "nccl" if _REAL_CUDA else "gloo"


def uses_transformer_engine() -> bool:
    """Whether models are built from Transformer Engine's layers (GPU) or from ours (CPU).

    Raises:
        UserError: on a GPU, Transformer Engine does not import: our layers would train there, at a
            fraction of the speed and without FP8.
    """
    if not _REAL_CUDA:
        return False
    try:
        import transformer_engine.pytorch  # noqa: F401
    except (ImportError, OSError) as error:  # OSError: a library that its extension links against
        raise UserError(
            f"there is a GPU, but Transformer Engine does not import ({error}): install it, built "
            "for this torch (docs/gpu.md; in a checkout: make setup-cuda), or hide the GPU "
            "with CUDA_VISIBLE_DEVICES= to train on the CPU",
            key="transformer_engine",
            cause=Cause.NOT_INSTALLED,
        ) from error
    warn_of_transformer_engine()
    return True


def prepare_process(local_rank: int = 0) -> torch.device:
    """Make this process able to import and run Megatron-Core; return the device to train on.

    Raises:
        UserError: Megatron-Core does not have the version that is tested.
    """
    global _prepared
    _check_megatron()
    if _REAL_CUDA:
        torch.cuda.set_device(local_rank)
    if not _prepared:
        with without_garbage_collection(), _without_wandb():
            for patch in PATCHES if not _REAL_CUDA else ():
                patch.install()  # imports what it changes
            for module in ("timers", "inference.engines.dynamic_engine"):
                import_module(f"megatron.core.{module}")
        if not _REAL_CUDA:
            keep_freed_memory()
        _prepared = True
    return device()


@contextlib.contextmanager
def _without_wandb() -> Iterator[None]:
    """Hide W&B from Megatron's modules, which import it where it is installed.

    It is for reports that we do not ask for, and costs a second of each rank's start, and temporary
    folders that a killed rank leaves."""
    if "wandb" in sys.modules:
        yield
        return
    sys.modules["wandb"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["wandb"]


def join_process_group(timeout: timedelta | None = None) -> None:
    """Initialize torch.distributed from torchrun's environment variables, unless it is already.

    It is not told the device: torch would make a communicator of NCCL for each of Megatron's groups
    at once, most of which nothing uses, by a call of all ranks for every group of any of them.

    Args:
        timeout: the timeout of its collective operations; None for torch's, ten minutes for NCCL.
    """
    if not dist.is_initialized():
        store = dist.PrefixStore("default_pg", trainer_store(timeout))
        dist.init_process_group(
            distributed_backend(),
            store=store,
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
            timeout=timeout,
        )


def broadcast_from_rank_zero(value: Any, group: dist.ProcessGroup | None = None) -> Any:
    """Return rank 0's `value` on every rank.

    Args:
        value: any object that pickles; of other ranks it is ignored.
        group: all ranks, over another backend than the default group's.
    """
    values = [value]
    # Over all ranks: only rank 0 has the value.
    dist.broadcast_object_list(values, src=0, group=group)
    return values[0]


def silence_warnings() -> None:
    """Ignore that Megatron prefers its HybridModel and computes the gradients' layout itself; on a
    CPU also that Apex and Transformer Engine are missing."""
    for name in ("models.gpt.gpt_model", "distributed.distributed_data_parallel"):
        logging.getLogger(f"megatron.core.{name}").setLevel(logging.ERROR)
    if not _REAL_CUDA:
        warnings.filterwarnings("ignore", module=r"megatron\.core\.")


def synchronize() -> None:
    """Wait for all work queued on the device; a CPU has no queue."""
    if _REAL_CUDA:
        torch.cuda.synchronize()


def empty_in_host_memory(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return an uninitialized tensor in host memory, pinned where there is a GPU: only to and from
    pinned memory are copies fast and asynchronous.

    Args:
        shape: the tensor's shape.
        dtype: the tensor's dtype.

    Raises:
        UserError: where no host memory is left to pin: torch takes the next power of two.
    """
    try:
        return torch.empty(shape, dtype=dtype, device=CPU_DEVICE, pin_memory=_REAL_CUDA)
    except RuntimeError as error:  # of the CUDA runtime: "CUDA error: out of memory"
        if not _REAL_CUDA or "out of memory" not in str(error):
            raise
        size = torch.Size(shape).numel() * dtype.itemsize
        allocated_bytes = 1 << (size - 1).bit_length()
        raise UserError(
            f"this node has not enough memory to pin {size / 2**30:.3g} GiB for a trainer rank's "
            "checkpoint, reference or offload, for which torch takes "
            f"{allocated_bytes / 2**30:.3g} GiB, the next power of two; give the node more memory, "
            "or spread the model over more ranks (parallel.tensor, .pipeline, .expert)",
            key="host_memory",
            cause=Cause.TOO_LARGE,
        ) from error


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host on `device`, without a wait of the host.

    To a GPU it is copied from pinned memory, in the order of the current stream.

    Args:
        tensor: on the CPU, any shape and dtype.
        device: a GPU, or the CPU, where the tensor itself is returned."""
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def rng_state() -> Tensor | None:
    """Return the state of the GPU's random stream; None without a GPU."""
    return torch.cuda.get_rng_state() if _REAL_CUDA else None


def set_rng_state(state: Tensor | None) -> None:
    """Restore what `rng_state` returned, where this process has a GPU too."""
    if _REAL_CUDA and state is not None:
        torch.cuda.set_rng_state(state)
