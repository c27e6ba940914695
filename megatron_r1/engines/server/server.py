"""One vLLM API server as a child process: its start, its log (also a temporary one), its end."""

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from r1_grading.base.lifetime import owns_number

from megatron_r1.base.processes import children, fork_client, oom_kills
from megatron_r1.base.processes.fork_client import ForkedProcess
from megatron_r1.base.processes.log_excerpts import file_excerpt
from megatron_r1.base.processes.scratch import Scratch, shared_files
from megatron_r1.engines.server.client import is_healthy
from megatron_r1.engines.server.errors import EngineError
from megatron_r1.engines.server.model_config import config_arguments, read_engine_hf_config
from megatron_r1.engines.server.settings import SERVER_MODULE, EngineSettings

STOP_SECONDS = 5.0
MEMORY_REMEDY = "lower rollout.kv_cache_gib, rollout.max_num_seqs or rollout.engines"
KILL_SECONDS = 30.0


class Server(ABC):
    """A vLLM server: a child process, one on other hosts, or one that is not ours."""

    poll_seconds = 0.05
    """The pause between two checks of `wait_ready`."""

    @property
    def is_lost(self) -> bool:
        """Whether the server has lost a host, so that a replacement needs another one."""
        return False

    @property
    @abstractmethod
    def url(self) -> str:
        """The address, `http://host:port`.

        Raises:
            EngineError: the address is not known yet.
        """

    @abstractmethod
    def start(self) -> None:
        """Start the server and return at once.

        Raises:
            EngineError: the model folder is unusable.
            OSError: the port is taken.
        """

    @abstractmethod
    def stop(self) -> None:
        """Stop the server and wait for its end; harmless if it has ended."""

    @abstractmethod
    def is_alive(self) -> bool:
        """Return whether the server may still answer."""

    @abstractmethod
    def describe_end(self) -> str:
        """Return a sentence on how the server ended, for an error."""

    @abstractmethod
    def _why_not_ready(self) -> str: ...

    async def wait_ready(self, timeout_seconds: float = 300.0) -> None:
        """Wait until the server answers; stop it if it does not.

        Raises:
            EngineError: the server ended (noticed at once), cannot start, or is not ready in time.
        """
        deadline = time.monotonic() + timeout_seconds
        while time.monotonic() < deadline:
            if not self.is_alive():
                raise EngineError(f"the engine did not start: {self.describe_end()}")
            if await self._is_ready():
                return
            await asyncio.sleep(self.poll_seconds)
        reason = self._why_not_ready()
        await asyncio.to_thread(self.stop)
        raise EngineError(f"the engine was not ready after {timeout_seconds:.0f} seconds: {reason}")

    async def _is_ready(self) -> bool:
        return await is_healthy(self.url)


class RunningServer(Server):
    """A server at a known address that is neither started nor stopped here."""

    def __init__(self, url: str) -> None:
        self._url = url

    @property
    def url(self) -> str:
        """The address that the recipe gives."""
        return self._url

    def start(self) -> None:
        """Do nothing: the server runs."""

    def stop(self) -> None:
        """Do nothing: the server is not ours to stop."""

    def is_alive(self) -> bool:
        """Return True: its requests tell when it is gone."""
        return True

    def describe_end(self) -> str:
        """Return a sentence that says whose server it is."""
        return f"{self.url} was not started here, and does not end here"

    def _why_not_ready(self) -> str:
        return f"{self.url}: no vLLM server answers"


class EngineServer(Server):
    """A vLLM API server on this host and the processes under it.

    They end with this process, also if that is killed, and with the thread that calls `start`: call
    it from one that lives as long as the engine should (the main thread).

    Log-probabilities are `processed_logprobs`: log softmax(logits / temperature) of the sampled
    token, in fp32, after top-k, top-p and min-p. So a trainer equals them by dividing its logits
    by the same temperature, and with any of these over the tokens that were kept
    (`return_sampling_mask`). Greedy sampling (temperature 0) reports the distribution at
    temperature 1.

    Args:
        model: a folder in Hugging Face format with `config.json` and the first weights.
        log_path: the file to which everything that the engine prints is appended.
        **settings: fields of `EngineSettings`.
    """

    def __init__(
        self, model: str | os.PathLike[str], log_path: str | os.PathLike[str], **settings: Any
    ) -> None:
        self.model = Path(model)
        self.log_path = Path(log_path)
        self.settings = EngineSettings(**settings)
        self.arguments = self.settings.arguments(self.model)
        self.environment = self.settings.environment()
        self.process: ForkedProcess | subprocess.Popen[bytes] | None = None
        part = self.settings.part
        self.coordinator = part.coordinator if part else ""
        """`host:port` where the parts of an engine meet; the first one's is known after `start`."""
        self._log_start = 0
        self._kills_before = 0
        self._scratch: Scratch | None = None
        self._port_holder: socket.socket | None = None
        self._url: str | None = None

    @property
    def url(self) -> str:
        """The address, known after `start`; empty for a part without the API server.

        Raises:
            EngineError: the engine has not been started.
        """
        if self._url is None:
            raise EngineError("the engine has not been started")
        return self._url

    def start(self) -> None:
        """Start the process on a free port and return at once.

        Raises:
            EngineError: the model folder is unusable.
            OSError: the port is taken.
        """
        hf_config = read_engine_hf_config(self.model)
        arguments = [*self._choose_ports(), *self.arguments]
        arguments += config_arguments(hf_config, self.settings.hf_overrides)
        part = self.settings.part
        if part is not None:
            arguments += part.arguments(self.settings.data_parallel, self.coordinator)
        self._scratch = Scratch()
        self._kills_before = oom_kills.num_oom_kills()
        self._log_start = self.log_path.stat().st_size if self.log_path.exists() else 0
        environment = self._scratch.environment() | self.environment
        self.process = fork_client.start(SERVER_MODULE, arguments, self.log_path, environment)

    async def wait_ready(self, timeout_seconds: float = 300.0) -> None:
        """Wait as `Server.wait_ready`, and note the files in shared memory that `stop` deletes.

        If all of the engine's processes are killed, no process is left to ask for them."""
        await super().wait_ready(timeout_seconds)
        assert self.process is not None and self._scratch is not None
        self._scratch.add_shared(shared_files(self.process.pid))

    def is_alive(self) -> bool:
        """Return whether the process has been started and has not ended."""
        return self.process is not None and self.process.poll() is None

    def stop(self) -> None:
        """End the process and those under it: with SIGKILL, on a GPU STOP_SECONDS after SIGTERM.
        Delete its temporary files and what it leaves in shared memory."""
        if self.process is None:
            return
        if self._scratch is not None and self.process.pid and owns_number(self.process):
            self._scratch.add_shared(shared_files(self.process.pid))
        if self.settings.device == "cpu":  # nothing to end in order; vLLM takes seconds to do so
            children.kill(self.process, KILL_SECONDS)
        else:
            children.stop(self.process, STOP_SECONDS, KILL_SECONDS)
        if self._scratch is not None:
            self._scratch.cleanup()
        if self._port_holder is not None:
            self._port_holder.close()

    def describe_end(self) -> str:
        """Return how the process ended and an excerpt of its log, root cause first."""
        code = self.process.poll() if self.process else None
        ending = f"exit code {code}"
        if code is not None and code < 0:
            ending = f"signal {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            ending += oom_kills.oom_explanation(self._kills_before, MEMORY_REMEDY)
        return f"{ending}; from {self.log_path}:\n{self.log_excerpt()}"

    def log_excerpt(self) -> str:
        """Return the root cause and the last lines of this process's output."""
        return file_excerpt(self.log_path, self._log_start)

    def _why_not_ready(self) -> str:
        return f"its log {self.log_path} ends with\n{self.log_excerpt()}"

    def _choose_ports(self) -> list[str]:
        """Choose the server's and the coordinator's port; return vLLM's argument."""
        settings = self.settings
        if settings.part is not None and not settings.part.serves:
            self._url = ""
            return []
        port = settings.port or children.free_port(settings.host)
        # Until vLLM listens there, no other engine may choose the port: this one would take the
        # other for itself.
        self._port_holder = socket.socket()
        self._port_holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as vLLM's
        self._port_holder.bind((settings.host, port))
        if settings.part is not None:
            host = socket.gethostbyname(settings.host)  # ZeroMQ listens at no name
            self.coordinator = f"{host}:{children.free_port(host)}"
        self._url = f"http://{settings.host}:{port}"
        return ["--port", str(port)]


@contextlib.contextmanager
def temporary_logs() -> Iterator[Path]:
    """Provide a temporary folder for the logs of engines. It stays where an engine fails, whose
    error names its log."""
    folder = Path(tempfile.mkdtemp(prefix="megatron_r1_logs_"))
    has_failed = False
    try:
        yield folder
    except EngineError:
        has_failed = True
        raise
    finally:
        if not has_failed:
            shutil.rmtree(folder, ignore_errors=True)
