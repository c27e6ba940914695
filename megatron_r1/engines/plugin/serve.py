"""vLLM's API server as this project runs it: `python -m megatron_r1.engines.plugin.serve ARGS`.

ARGS are those of `vllm serve`. Differences from vLLM's own entry: the server and its children die
with their parent; all requests need the engine's secret (`SecretMiddleware`); one endpoint does all
of a swap of weights (`weight_swap`), and that for samples also replies in bytes (`reply_writer`);
on CPU the engine core is forked instead of spawned, as vLLM does on GPU, so that torch and
vllm are imported once and not two or three times, and keeps the memory that it frees. `--headless`
runs one host's part of an engine whose server is on another host."""

import contextlib
import os
import secrets
import signal
import sys
from importlib import import_module
from typing import Any

from megatron_r1.base.processes import children, timeline
from megatron_r1.base.processes.process_memory import keep_freed_memory, without_garbage_collection
from megatron_r1.engines.plugin import dump_stacks_on_signal, register

VARIABLES_READ_AFTER_IMPORT = frozenset(
    {"CUDA_VISIBLE_DEVICES", "TORCHINDUCTOR_CACHE_DIR", "VLLM_API_KEY", "VLLM_CPU_KVCACHE_SPACE"}
)
"""Environment variables that no import reads (`base.processes.fork_server`)."""
LATER_IMPORTS = (
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.worker.cpu_model_runner",
    "vllm.model_executor.layers.quantization.online.base",
    "vllm.distributed.device_communicators.cpu_communicator",
    "vllm.entrypoints.generate.structured_decisions.api_router",
    "vllm.entrypoints.openai.chat_completion.api_router",
    "vllm.entrypoints.rl.online.api_router",
    "model_hosting_container_standards.sagemaker",
    "uvicorn.protocols.http.httptools_impl",
    "uvicorn.protocols.websockets.websockets_sansio_impl",
)
"""What vLLM imports when an engine on a CPU starts."""
SECRET_VARIABLE = "VLLM_API_KEY"
"""Environment variable. vLLM's own, so that both checks use one secret."""
OPEN_PATHS = ("/health",)


class SecretMiddleware:
    """ASGI middleware: 401 for requests, except to `OPEN_PATHS`, without `Authorization: Bearer
    SECRET`; websockets are closed.

    vLLM's own check (VLLM_API_KEY) does not cover the calls that pause an engine, replace its
    weights or run a method by name in its workers."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.expected = f"Bearer {os.environ[SECRET_VARIABLE]}".encode()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Pass an authorized request on; answer 401 to others, 1008 to a websocket."""
        if scope["type"] == "lifespan" or scope["path"] in OPEN_PATHS or self._is_authorized(scope):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            headers = [(b"content-type", b"text/plain"), (b"www-authenticate", b"Bearer")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            body = b"this engine belongs to a run: requests need its secret\n"
            await send({"type": "http.response.body", "body": body})

    def _is_authorized(self, scope: dict[str, Any]) -> bool:
        authorization = dict(scope["headers"]).get(b"authorization", b"")
        return secrets.compare_digest(authorization, self.expected)


def _fork_on_cpu() -> None:
    """Let vLLM fork its engine core on CPU.

    Upstream: platforms/cpu.py: `CpuPlatform.check_and_update_config`. Without it: every
    process is spawned, so that it reads its own OpenMP settings when it loads, and imports vLLM
    again; `engine_environment` sets them before the first process starts. Goes when: the method can
    be set."""
    from vllm.platforms.cpu import CpuPlatform

    upstream = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls: Any, vllm_config: object) -> None:
        upstream(cls, vllm_config)
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)


def _begin_child() -> None:
    """Prepare a forked process."""
    children.die_with_parent()
    # A forked child inherits the event loop's wakeup descriptor. Through it a SIGTERM to this rank,
    # which vLLM sends when another rank has died, would reach the server: the server would shut
    # down and wait for ever for requests that are no longer computed, instead of failing them.
    signal.set_wakeup_fd(-1)


def _serve_headless() -> None:
    """Do what vLLM's `serve --headless` does, whose script does not find its own version in the
    package vllm-cpu."""
    from vllm.entrypoints.cli.serve import run_headless
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    options = make_arg_parser(FlexibleArgumentParser()).parse_args()
    validate_parsed_serve_args(options)
    options.api_server_count = 0
    run_headless(options)


def preload() -> None:
    """Import what `main` needs, and on a CPU what vLLM imports later: 1,000 more modules."""
    import_module("vllm.entrypoints.launchers.api_server.entry")
    import_module("megatron_r1.engines.plugin.weight_swap")
    import_module("megatron_r1.engines.plugin.reply_writer")
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        register()  # before the modules that it patches are imported by others
        for module_name in LATER_IMPORTS:
            with contextlib.suppress(ModuleNotFoundError):  # another vLLM: it is only faster so
                import_module(module_name)


def main() -> None:
    """Serve until a signal."""
    children.end_without_parent()
    dump_stacks_on_signal()
    os.register_at_fork(after_in_child=_begin_child)
    timeline.mark("engine/process begins")
    with without_garbage_collection():
        preload()
    timeline.mark("engine/imports made")
    from vllm.entrypoints.launchers.api_server.entry import main as serve
    from vllm.platforms import current_platform

    from megatron_r1.engines.plugin import pushed_adapter, reply_writer, weight_swap

    weight_swap.add_swap()
    reply_writer.add_samples()
    pushed_adapter.serve_pushed_adapter()
    if current_platform.is_cpu():
        _fork_on_cpu()
        keep_freed_memory(also_large=True)
    if "--headless" in sys.argv:
        _serve_headless()
    else:
        serve()


if __name__ == "__main__":
    main()
