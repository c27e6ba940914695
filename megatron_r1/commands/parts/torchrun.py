"""Commands under torchrun, or srun in its manner: every process it starts is a trainer rank, and
rank 0 starts the controller, which runs the command."""

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Mapping

from megatron_r1.base.processes import children
from megatron_r1.base.processes.authentication import RANKS_TOKEN_VARIABLE
from megatron_r1.base.processes.children import die_with_parent
from megatron_r1.config import Config

PORT, WORLD_SIZE = "MEGATRON_R1_PORT", "MEGATRON_R1_WORLD_SIZE"
"""Set for a controller that rank 0 started: the port that the ranks connect to; their number."""

SPANS_NODES = "MEGATRON_R1_SPANS_HOSTS"
"""Set for such a controller if the ranks are on several nodes."""

POLL_SECONDS = 0.2

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def is_rank() -> bool:
    """Whether torchrun started this process as a trainer rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def starts_ranks() -> bool:
    """Whether this controller starts the trainer ranks itself."""
    return PORT not in os.environ


def world_size(config: Config) -> int:
    """Return the number of trainer ranks: torchrun's, where it has started this controller's."""
    return int(os.environ.get(WORLD_SIZE, 0)) or config.parallel.processes


def start_controller(
    arguments: list[str], inherited: Mapping[str, str]
) -> tuple[subprocess.Popen[bytes], str]:
    """Start the controller next to rank 0; return it and the address for all ranks.

    Args:
        arguments: those of the command.
        inherited: the environment without what is for ranks alone, which engines would inherit."""
    port = children.free_port()
    os.environ[RANKS_TOKEN_VARIABLE] = secrets.token_hex(32)  # rank 0 sends it to the other ranks
    environment = {k: v for k, v in inherited.items() if k not in TORCHRUN}
    environment[RANKS_TOKEN_VARIABLE] = os.environ[RANKS_TOKEN_VARIABLE]
    environment |= {PORT: str(port), WORLD_SIZE: os.environ["WORLD_SIZE"]}
    if os.environ.get("LOCAL_WORLD_SIZE", environment[WORLD_SIZE]) != environment[WORLD_SIZE]:
        environment[SPANS_NODES] = "1"
    controller = subprocess.Popen(
        [sys.executable, "-m", "megatron_r1", *arguments],
        env=environment,
        preexec_fn=die_with_parent,
    )
    return controller, f"tcp://{os.environ['MASTER_ADDR']}:{port}"


def await_listening(controller: subprocess.Popen[bytes], address: str) -> str | None:
    """Wait until the controller listens at `address` and return it; None if it has ended before, as
    it does for a mistake, and for a run that is finished."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    while controller.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=5):
            return address
        time.sleep(POLL_SECONDS)
    return None
