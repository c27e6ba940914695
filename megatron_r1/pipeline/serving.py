"""Servers of the models that a stage calls while it runs: reward models, a judge, a teacher."""

import asyncio
import contextlib
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from megatron_r1.base.errors import RunError
from megatron_r1.base.processes.children import free_port
from megatron_r1.base.processes.log_excerpts import excerpt_log
from megatron_r1.base.processes.scratch import Scratch
from megatron_r1.engines.server import gpu
from megatron_r1.engines.server.client import is_healthy
from megatron_r1.engines.server.environment_variables import engine_environment
from megatron_r1.engines.server.model_config import config_arguments
from megatron_r1.models.hf_config_file import load_raw_hf_config
from megatron_r1.pipeline.child import StageProcess, describe_status
from megatron_r1.pipeline.pipeline_recipe import ServeConfig

POLL_SECONDS = 0.1
END_SECONDS = 15.0
"""Time that the server of a killed attempt has to end and to free its port: a choice."""
CPU_THREADS, CPU_CACHE_GIB = 1, 1
"""Threads and GiB of KV cache of a model that is served on a CPU."""
VLLM = "megatron_r1.engines.plugin.serve"
"""Module that runs vLLM's own server, whose engine processes end with it."""


class StageServer:
    """One served model or other HTTP service."""

    def __init__(self, name: str, config: ServeConfig, port: int, log: Path) -> None:
        """Start the server.

        Args:
            name: the server's name in the stage.
            config: the server's settings, with references replaced.
            port: the port on which it listens.
            log: the file of its output."""
        self.name, self.config, self.log = name, config, log
        self.url = server_url(config, port)
        self._scratch = Scratch() if config.model else None
        environment: dict[str, str] = {}
        if self._scratch is not None:
            environment = engine_environment(gpu.engine_device(), CPU_THREADS, CPU_CACHE_GIB)
            environment |= self._scratch.environment()
        command = server_command(name, config, port)
        self._child = StageProcess(command, log, launch=config.launch, environment=environment)

    def wait_ready(self, while_waiting: Callable[[], None]) -> None:
        """Return when the server answers.

        Args:
            while_waiting: a function that is called several times a second, and may raise.

        Raises:
            RunError: when the server ended, or is not ready after `timeout_seconds`."""
        deadline = time.monotonic() + self.config.timeout_seconds
        while time.monotonic() < deadline:
            while_waiting()
            self.check()
            if asyncio.run(is_healthy(self.url, self.config.health)):
                return
            time.sleep(POLL_SECONDS)
        raise RunError(
            f"serve.{self.name}: not ready after {self.config.timeout_seconds:g} s; raise its "
            f"timeout_seconds if it only needs longer. {self.log} says:\n"
            f"{excerpt_log(self._child.output())}"
        )

    def check(self) -> None:
        """Raise RunError if the server has ended."""
        status = self._child.poll()
        if status is not None:
            raise RunError(
                f"serve.{self.name}: the server ended ({describe_status(status)}); {self.log} "
                f"says:\n{excerpt_log(self._child.output())}"
            )

    def stop(self) -> None:
        """Stop the server and remove its scratch folder."""
        self._child.stop()
        if self._scratch is not None:
            self._scratch.cleanup()


@contextlib.contextmanager
def serve_models(
    configs: Mapping[str, ServeConfig],
    ports: Mapping[str, int],
    logs: Mapping[str, Path],
    while_waiting: Callable[[], None],
) -> Iterator[list[StageServer]]:
    """Start servers and yield them when all are ready; they are stopped at the end of the block.

    Args:
        configs: the servers' settings, by name.
        ports: the servers' ports, by name.
        logs: the servers' log files, by name.
        while_waiting: as for `StageServer.wait_ready`."""
    servers: list[StageServer] = []
    try:
        for name, config in configs.items():
            servers.append(StageServer(name, config, ports[name], logs[name]))
        for server in servers:
            server.wait_ready(while_waiting)
        yield servers
    finally:
        for server in servers:
            server.stop()


def server_command(name: str, config: ServeConfig, port: int) -> list[str]:
    """Return the command line of a server, without its launcher.

    Args:
        name: the name that requests give for the model.
        config: the model and its arguments.
        port: the port to listen at."""
    if config.command:
        return [
            word.replace("{port}", str(port)).replace("{host}", config.host)
            for word in config.command
        ]
    return [
        sys.executable,
        "-m",
        VLLM,
        "--model",
        config.model,
        "--served-model-name",
        name,
        "--host",
        config.host,
        "--port",
        str(port),
        *(["--runner", "pooling"] if config.task == "classify" else []),
        *(["--enforce-eager"] if gpu.engine_device() == "cpu" else []),
        *_config_arguments(Path(config.model)),
        *config.arguments,
    ]


def _config_arguments(model: Path) -> list[str]:
    # Another model is one of the hub, which vLLM fetches.
    return (
        config_arguments(load_raw_hf_config(model), None)
        if (model / "config.json").is_file()
        else []
    )


def choose_ports(
    configs: Mapping[str, ServeConfig], previous_ports: Mapping[str, int]
) -> dict[str, int]:
    """Return a port for each server: the one it had before, as a run that continues expects it.

    Raises:
        RunError: another process has taken that port.
    """
    ports: dict[str, int] = {}
    for name, config in configs.items():
        port = previous_ports.get(name)
        if port is None:
            port = free_port(config.host)
            while port in ports.values():
                port = free_port(config.host)
        elif not _becomes_free(config.host, port):
            raise RunError(
                f"serve.{name}: port {port} of {config.host}, where this stage began with it, is "
                "in use by another process; end that one"
            )
        ports[name] = port
    return ports


def server_url(config: ServeConfig, port: int) -> str:
    """Return the address of a served model, without a path."""
    return f"http://{config.host}:{port}"


def _becomes_free(host: str, port: int) -> bool:
    """Return whether a port is free, after the server of a killed attempt has had time to end."""
    deadline = time.monotonic() + END_SECONDS
    while time.monotonic() < deadline:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return True
        time.sleep(POLL_SECONDS)
    return False
