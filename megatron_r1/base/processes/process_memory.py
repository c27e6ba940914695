"""The memory of a process: what its allocators keep, glibc's and torch's on GPUs, and what Python's
garbage collector leaves alone.

glibc would map large blocks anew each time, page by page zeroed: half a second per GB where the
kernel has free pages, three to four where a virtual machine has to get them from its host.

Trainer ranks let torch's allocator grow its segments ("expandable segments"). Their micro-batches
have any length, and with segments of fixed sizes the gaps between tensors add up until one does
not fit, on a GPU that is planned nearly full. Engines have torch's default, or what the user sets,
with one exception: with `cuda_ipc` they hand their receive buffer to trainer ranks, and memory of
a growing segment can be opened only by processes that may take file descriptors of each other
(pidfd_getfd, which containers forbid). A trainer rank only opens that memory, so its own allocator
does not matter. vLLM's sleep mode needs fixed segments too, and sees to it itself
(device_allocator/cumem.py: `use_memory_pool`).

Pinned memory of a trainer rank has the size it was asked for. torch takes the next power of two, of
a reference of 11 GiB in tensors of 56 and 28 MiB an eighth more, of one buffer of 21 GiB half as
much again.

Large frameworks make millions of objects that stay; Python's collector walks them again and again.
With it off, on two cores `import vllm`'s server takes 4.4 instead of 8.1 seconds, the trainer's
modules 2.6 instead of 5.8."""

import contextlib
import ctypes
import gc
import re
from collections.abc import Iterator, Mapping
from importlib import metadata

# Parameters of mallopt (malloc.h).
MMAP_THRESHOLD = -3
TRIM_THRESHOLD = -1
TOP_PAD = -2
MMAP_MAX = -4


def keep_freed_memory(*, also_large: bool = False) -> None:
    """Have this process, and processes forked from it, keep the memory that they free; do nothing
    with a C library other than glibc.

    Args:
        also_large: whether to keep blocks above 32 MiB too, the largest that glibc takes from its
            heap while it may map any. Engines need that, which allocate their largest blocks,
            packed matrices, with every push; trainers allocate their largest blocks once."""
    settings = {MMAP_THRESHOLD: 32 << 20, TRIM_THRESHOLD: 512 << 20, TOP_PAD: 64 << 20}
    if also_large:
        settings[MMAP_MAX] = 0
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        for parameter, value in settings.items():
            mallopt(parameter, value)


ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""The environment variables that torch reads, in this order, when it is imported."""
ALLOCATOR_SETTING = "expandable_segments"
TRAINER_VARIABLE = "PYTORCH_CUDA_ALLOC_CONF"
"""The variable that all tested versions of torch read."""
ROUNDED_MIB = 1
"""Pinned blocks up to this size are rounded up, so that small ones find each other's place."""
ROUNDING_SINCE = 2, 13
"""The tested version with `pinned_max_round_threshold_mb`; one that does not know it ends the
process."""


def trainer_allocator(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what to add to the environment of a trainer rank on a GPU: nothing where the user has
    configured the allocator."""
    if any(environment.get(name) for name in ALLOCATOR_VARIABLES):
        return {}
    settings = [f"{ALLOCATOR_SETTING}:True"]
    release = re.match(r"(\d+)\.(\d+)\.\d+(?![\da-z])", metadata.version("torch"))
    if release and tuple(map(int, release.groups())) >= ROUNDING_SINCE:
        settings.append(f"pinned_max_round_threshold_mb:{ROUNDED_MIB}")
    return {TRAINER_VARIABLE: ",".join(settings)}


def exporting_engine_allocator(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what to replace in the environment of an engine that hands out memory of its GPU."""
    changed_settings = {}
    for name in ALLOCATOR_VARIABLES:
        fields = [field.strip() for field in environment.get(name, "").split(",")]
        kept_fields = [
            field for field in fields if field.partition(":")[0].strip() != ALLOCATOR_SETTING
        ]
        if kept_fields != fields:
            changed_settings[name] = ",".join([*kept_fields, f"{ALLOCATOR_SETTING}:False"])
    return changed_settings


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Disable garbage collection inside the block, then freeze what was imported. Objects that
    exist at the end are excluded from collection for good (`gc.freeze`), which also saves forked
    children their copies of them."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
