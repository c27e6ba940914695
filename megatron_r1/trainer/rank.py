"""Entry point of a trainer rank's process.

    python -m megatron_r1.trainer.rank CONTROLLER_ADDRESS RECIPE_JSON

with torchrun's environment variables set (RANK, WORLD_SIZE, …)."""

import sys
from importlib import import_module

import msgspec

from megatron_r1.base.processes import children, timeline
from megatron_r1.base.processes.authentication import RANKS_TOKEN_VARIABLE
from megatron_r1.base.processes.process_memory import without_garbage_collection

VARIABLES_READ_AFTER_IMPORT = frozenset({*children.rank_variables(0, 1, 0), RANKS_TOKEN_VARIABLE})
"""Environment variables that no import reads (`base.processes.fork_server`)."""
MODULES_IMPORTED_AFTER_PREPARE = (
    "trainer.checkpoint_manager",
    "trainer.implementations",
    "trainer.trainer",
    "push.rank_push",
)
"""Modules that `rank_server.RankServer` imports, as they need a process that is prepared."""


def preload() -> None:
    """Import what a rank needs; on a CPU Megatron-Core as well."""
    from megatron_r1.models import platform

    if not platform.has_gpu():
        platform.prepare_process()
        for module in ("trainer.rank_server", *MODULES_IMPORTED_AFTER_PREPARE):
            import_module(f"megatron_r1.{module}")


def main() -> None:
    """Serve the controller whose address is the first argument, until it stops the rank or ends."""
    children.end_without_parent()
    timeline.mark("trainer/process begins")
    with without_garbage_collection():
        from megatron_r1.config import parse_recipe
        from megatron_r1.trainer import distributed, rank_server
    address, config_json = sys.argv[1:]
    timeline.mark("trainer/imports made")
    rank_server.serve_calls(parse_recipe(msgspec.json.decode(config_json)), address)
    distributed.leave_process_groups()


if __name__ == "__main__":
    main()
