"""Which processes let torch's allocator on a GPU grow its segments ("expandable segments").

Trainer ranks do. Their micro-batches have any length, and with segments of fixed sizes the gaps
between tensors add up until one does not fit, on a GPU that is planned nearly full.

Engines have torch's default, or what the user sets, with one exception: with `cuda_ipc` they hand
their receive buffer to trainer ranks, and memory of a growing segment can be opened only by
processes that may take file descriptors of each other (pidfd_getfd, which containers forbid). A
trainer rank only opens that memory, so its own allocator does not matter. vLLM's sleep mode needs
fixed segments too, and sees to it itself (device_allocator/cumem.py: `use_memory_pool`)."""

from collections.abc import Mapping

VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""The environment variables that torch reads, in this order, when it is imported."""
SETTING = "expandable_segments"
EXPANDABLE = {"PYTORCH_CUDA_ALLOC_CONF": f"{SETTING}:True"}
"""The variable that all tested versions of torch read."""


def of_trainer(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what to add to the environment of a trainer rank on a GPU: nothing where the user has
    configured the allocator."""
    return {} if any(environment.get(name) for name in VARIABLES) else dict(EXPANDABLE)


def of_exporting_engine(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what to replace in the environment of an engine that hands out memory of its GPU."""
    changed = {}
    for name in VARIABLES:
        fields = [field.strip() for field in environment.get(name, "").split(",")]
        kept = [field for field in fields if field.partition(":")[0].strip() != SETTING]
        if kept != fields:
            changed[name] = ",".join([*kept, f"{SETTING}:False"])
    return changed
