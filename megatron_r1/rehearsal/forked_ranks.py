"""torchrun with ranks that are forked from one process, after what all of them import: `python -m
megatron_r1.rehearsal.forked_ranks TORCHRUN_ARGUMENTS`.

Imports are most of the CPU time of a rank that does three steps with a small model: 4 of 7 s."""

import importlib
import os
import signal

from megatron_r1 import platform
from megatron_r1.processes.imports import without_garbage_collection

IMPORTED = (
    "megatron_r1.cli",
    "megatron_r1.commands.rl",
    "megatron_r1.training.folders",
    "megatron_r1.training.trainer",
    "megatron_r1.training.worker",
    "megatron_r1.weight_sync.trainer_rank",
)


def main() -> None:
    """Import, then be torchrun."""
    platform.prepare()
    with without_garbage_collection():
        for module in IMPORTED:
            importlib.import_module(module)
    # torchrun's own handler, inherited, would wait for the end of a collective that has no end.
    os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    from torch.distributed import run

    run.main()


if __name__ == "__main__":
    main()
