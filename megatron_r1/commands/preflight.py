"""Check nodes, links and files before a long run: versions, matrix products, the collectives of the
recipe's layout, memory, run folder, ports, clocks, sandbox. Start it as the run itself, under
torchrun or Slurm; alone it starts `parallel.processes` ranks here. See docs/preflight.md."""

import os
import subprocess
import sys
from collections.abc import Sequence

from megatron_r1.base.processes.children import die_with_parent

REQUIRED = ("run.folder",)
SETTINGS = ("preflight",)


def start_ranks(arguments: Sequence[str], num_ranks: int) -> int:
    """Run the command with these arguments as `num_ranks` ranks on this machine; return its exit
    status."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    command = [sys.executable, "-m", *launcher, "-m", "megatron_r1", *arguments]
    environment = os.environ | {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive")}
    # No new session: Ctrl-C reaches torchrun, which ends its ranks.
    return subprocess.run(command, env=environment, preexec_fn=die_with_parent).returncode
