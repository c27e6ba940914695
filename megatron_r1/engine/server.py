"""One vLLM API server as a child process: its start, its log, its end."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from megatron_r1.engine.errors import EngineError
from megatron_r1.engine.log import excerpt
from megatron_r1.engine.scratch import Scratch, shared_files
from megatron_r1.engine.settings import EngineSettings
from megatron_r1.processes import lifetime
from megatron_r1.processes.children import free_port

STOP_GRACE_SECONDS = 5.0
KILL_SECONDS = 30.0
POLL_SECONDS = 0.05
EXCERPT_BYTES = 2**18  # that are read of a log's beginning, and of its end


class EngineServer:
    """A vLLM API server and the processes under it.

    They end with this process, whatever ends it, and also with the thread that calls `start`: call
    it from one that lives as long as the engine should (the main thread).

    Log-probabilities are `processed_logprobs`: log softmax(logits / temperature) of the sampled
    token, in fp32, after the top-p cut if there is one. So a trainer equals them by dividing its
    logits by the same temperature, and only with top_p = 1: a cut renormalizes over the tokens that
    are left. Greedy sampling (temperature 0) reports the distribution at temperature 1.
    """

    is_lost = False
    """As `RemoteServer.is_lost`; its host is this one."""

    def __init__(
        self, model: str | os.PathLike[str], log_path: str | os.PathLike[str], **settings: Any
    ) -> None:
        """Note the settings; `start` begins.

        Args:
            model: folder with `config.json` (Hugging Face) and the first weights.
            log_path: receives everything the engine prints; appended to.
            settings: of `EngineSettings`.
        """
        self.model = Path(model)
        self.log_path = Path(log_path)
        self.settings = EngineSettings(**settings)
        self.arguments = self.settings.arguments(self.model)
        self.environment = self.settings.environment()
        self.process: subprocess.Popen[bytes] | None = None
        part = self.settings.part
        self.coordinator = part.coordinator if part else ""
        """`host:port` where the parts of an engine meet; the first one's is known after `start`."""
        self._log_start = 0
        self._scratch: Scratch | None = None
        self._shared: list[Path] = []
        """What it had once it was ready, should all of it be killed before `stop`."""
        self._url: str | None = None

    @property
    def url(self) -> str:
        """`http://host:port`, known after `start`; empty for a part that does not serve."""
        if self._url is None:
            raise EngineError("the engine has not been started")
        return self._url

    def start(self) -> None:
        """Start the process on a free port and return at once.

        Raises:
            EngineError: the model folder cannot be one.
            OSError: the port is taken.
        """
        check_model_folder(self.model)
        command = [sys.executable, "-m", "megatron_r1.vllm_plugin.serve", *self.arguments]
        command += self._where_to_listen()
        part = self.settings.part
        if part is not None:
            command += part.arguments(part, self.settings.data, self.coordinator)
        self._scratch = Scratch()
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as log:
            self._log_start = log.tell()
            self.process = subprocess.Popen(
                command,
                env=os.environ
                | self._scratch.environment()
                | self.environment
                | {lifetime.PARENT: str(os.getpid())},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Ctrl-C is the controller's to handle, and stop() signals the whole group.
                start_new_session=True,
            )

    def wait_ready(self, timeout_seconds: float = 300.0) -> None:
        """Block until the server answers.

        Raises:
            EngineError: the process ended (noticed at once) or the time is over; quotes the log.
        """
        deadline = time.monotonic() + timeout_seconds
        while time.monotonic() < deadline:
            if not self.is_alive():
                raise EngineError(f"the engine did not start: {self.describe_end()}")
            with contextlib.suppress(urllib.error.URLError, OSError):
                if urllib.request.urlopen(f"{self.url}/health", timeout=5).status == 200:
                    assert self.process is not None
                    self._shared = shared_files(self.process.pid)
                    return
            time.sleep(POLL_SECONDS)
        self.stop()
        raise EngineError(
            f"the engine was not ready after {timeout_seconds:.0f} seconds; {self.log_path} says:\n"
            f"{self.log_excerpt()}"
        )

    def is_alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def stop(self) -> None:
        """End the process and everything under it; harmless if it has ended."""
        if self.process is None:
            return
        shared = {*self._shared, *shared_files(self.process.pid)}
        if self.is_alive():
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_GRACE_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        # A process in the kernel's hands, of a driver that hangs, does not end even so.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(KILL_SECONDS)
        if self._scratch is not None:
            self._scratch.cleanup()
        for path in shared:
            path.unlink(missing_ok=True)

    def describe_end(self) -> str:
        """How the process ended and what its log says, root cause first."""
        code = self.process.poll() if self.process else None
        how = (
            f"signal {signal.Signals(-code).name}"
            if code is not None and code < 0
            else f"exit code {code}"
        )
        return f"{how}; from {self.log_path}:\n{self.log_excerpt()}"

    def log_excerpt(self) -> str:
        """The root cause and the last lines of what this process wrote."""
        with self.log_path.open("rb") as log:
            log.seek(self._log_start)
            text = log.read(EXCERPT_BYTES)
            # An engine that dies with hundreds of requests says the same for each of them.
            end = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start + len(text), end - EXCERPT_BYTES))
            return excerpt((text + log.read()).decode(errors="replace"))

    def _where_to_listen(self) -> list[str]:
        """Choose the ports; vLLM's argument."""
        here = self.settings
        if here.part is not None and not here.part.serves:
            self._url = ""
            return []
        port = here.port or free_port(here.host)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as vLLM's own does
            probe.bind((here.host, port))
            if here.part is not None:  # while this port is taken: it has to be another
                host = socket.gethostbyname(here.host)  # ZeroMQ listens at no name
                self.coordinator = f"{host}:{free_port(host)}"
        self._url = f"http://{here.host}:{port}"
        return ["--port", str(port)]


def check_model_folder(model: Path) -> None:
    """Refuse what vLLM would refuse only after importing everything.

    Raises:
        EngineError: no folder, no `config.json`, or one that names no architecture.
    """
    config = model / "config.json"
    if not config.is_file():
        raise EngineError(
            f"{model} is not a model folder: it has no config.json; name a folder in Hugging Face "
            "format, such as the hf/ of a run"
        )
    try:
        architectures = json.loads(config.read_text(encoding="utf-8")).get("architectures")
    except (ValueError, AttributeError) as error:
        raise EngineError(f"{config} is not a JSON object: {error}") from error
    if not architectures:
        raise EngineError(f'{config} has no "architectures": vLLM cannot tell which model this is')
