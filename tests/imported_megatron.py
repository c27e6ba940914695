"""Imports what the ranks of `ranks.run_ranks` need; loaded once, by their fork server."""

from megatron_r1 import platform
from megatron_r1.processes.imports import without_garbage_collection

with without_garbage_collection():
    platform.prepare()

    import transformers  # noqa: F401

    from megatron_r1.training import trainer, worker  # noqa: F401
