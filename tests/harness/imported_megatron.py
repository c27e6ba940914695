"""Imports what the ranks of `ranks.run_ranks` need; loaded once, by their fork server."""

from megatron_r1.base.processes.process_memory import without_garbage_collection
from megatron_r1.models import platform

with without_garbage_collection():
    platform.prepare_process()

    import transformers  # noqa: F401

    from megatron_r1.trainer import rank_server, trainer  # noqa: F401
