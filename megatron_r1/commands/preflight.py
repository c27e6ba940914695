"""Check nodes, links and files before a long run: versions, matrix products, the collectives of the
recipe's layout, memory, run folder, ports, clocks, sandbox. Start it as the run itself, under
torchrun or Slurm; alone it starts `parallel.processes` ranks here. See docs/preflight.md."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_r1 import config as configuration
from megatron_r1.base.files import access
from megatron_r1.base.processes.children import die_with_parent
from megatron_r1.base.processes.process_memory import without_garbage_collection
from megatron_r1.commands.parts import torchrun
from megatron_r1.config.overrides import take_section
from megatron_r1.rehearse.settings import PreflightRecipe

REQUIRED_KEYS = ("run.folder",)
SETTINGS = ("preflight",)
SHORT_OPTIONS = {"json": "preflight.output"}


def run(path: str, overrides: Mapping[str, Any], verbs: Mapping[str, str]) -> None:
    """Be a rank of the preflight under torchrun; otherwise start all of its ranks here.

    Args:
        path: the recipe's.
        overrides: settings of the recipe, and `preflight.` settings.
        verbs: as for the other verbs that read a recipe; none is run.

    Raises:
        UserError: for a recipe with mistakes.
        RunError: on rank 0, for nodes that are not fit for the run.
        SystemExit: with the status of the ranks that it started, if they failed."""
    settings, recipe_overrides = take_section(overrides, PreflightRecipe)
    config = configuration.load_recipe(path, recipe_overrides, required=REQUIRED_KEYS)
    access.allow_readers(config.run.readable_by)
    world_size = torchrun.world_size(config)
    if not torchrun.is_rank():
        config.parallel.check_sizes(world_size)
        if status := start_ranks(sys.argv[1:], world_size):
            sys.exit(status)  # the ranks have said why
        return
    with without_garbage_collection():  # they import torch
        from megatron_r1.rehearse.preflight import findings, rank

    facts = rank.run(config, settings.preflight)
    if facts:
        results = findings.preflight_results(config, settings.preflight, facts)
        findings.write_preflight_report(Path(path).stem, settings.preflight, facts, results)


def start_ranks(arguments: Sequence[str], world_size: int) -> int:
    """Run the command with these arguments as `world_size` ranks on this machine; return its exit
    status."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]
    command = [sys.executable, "-m", *launcher, "-m", "megatron_r1", *arguments]
    environment = os.environ | {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive")}
    # No new session: Ctrl-C reaches torchrun, which ends its ranks.
    return subprocess.run(command, env=environment, preexec_fn=die_with_parent).returncode
