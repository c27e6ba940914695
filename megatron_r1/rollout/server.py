"""One vLLM API server as a child process: its command line, its environment, its log, its end."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from megatron_r1.processes import free_port
from megatron_r1.rollout import engine_part
from megatron_r1.rollout.engine_part import Part
from megatron_r1.rollout.errors import EngineError
from megatron_r1.rollout.vllm_plugin import admission, lifetime

MIDDLEWARE = f"{admission.__name__}.{admission.Admission.__name__}"
STOP_GRACE_SECONDS = 5.0
KILL_SECONDS = 30.0
POLL_SECONDS = 0.05
EXCERPT_BYTES = 2**18  # that are read of a log's beginning, and of its end
LINE_CHARS = 300  # vLLM names its several hundred architectures when it does not know one
# "ValueError: ..." or pydantic's "Value error, ...", whatever stands before it.
ERROR_LINE = re.compile(
    r"(?:^|[\s\]])((?:\w+\.)*\w*(?:Error|Exception)\w*: (?!\d+ validation).+|Value error, .+)$"
)
# Warnings name errors that were survived; the rest is what Python extensions say on their way out.
NOISE = re.compile(r" (WARNING|INFO) [\d-]+ [\d:]+ \[|nanobind: | - leaked |INFO: +")
LOG_PREFIX = re.compile(r"^(\(\w+ pid=\d+\) )?([A-Z]+ [\d-]+ [\d:]+ \[[^\]]+\] )?")


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
        self,
        model: str | os.PathLike[str],
        log_path: str | os.PathLike[str],
        *,
        device: Literal["cpu", "cuda"] = "cpu",
        dtype: str = "float32",
        max_model_len: int = 1024,
        max_num_seqs: int = 256,
        seed: int = 0,
        num_threads: int = 2,
        kv_cache_gib: int = 1,
        prefix_caching: bool = True,
        weight_transfer_backend: str = "megatron_r1_shm",
        return_routing: bool = False,
        tensor: int = 1,
        pipeline: int = 1,
        data: int = 1,
        expert_parallel: bool = False,
        gpu_memory: float | None = None,
        sleeps: bool = False,
        secret: str = "",
        host: str = "127.0.0.1",
        port: int | None = None,
        part: Part | None = None,
        extra_args: Sequence[str] = (),
        extra_env: Mapping[str, str] | None = None,
    ) -> None:
        """Note the settings; `start` begins.

        Args:
            model: folder with `config.json` (Hugging Face) and the first weights.
            log_path: receives everything the engine prints; appended to.
            dtype: of weights, activations and KV cache.
            max_model_len: prompt plus response, tokens.
            max_num_seqs: sequences decoded together, by each of `data` copies.
            num_threads: OpenMP threads of all ranks together (CPU only).
            kv_cache_gib: memory of a rank for keys and values (CPU only).
            prefix_caching: share the prompt's keys and values within a group. vLLM turns it off for
                MLA on CPU.
            weight_transfer_backend: a name registered by `vllm_plugin`.
            return_routing: have every answer carry the experts of every token (a model with experts
                only). On a GPU vLLM has this in its second model runner and with prefix caching; on
                a CPU `vllm_plugin.cpu_routing` adds it, without.
            tensor, pipeline, data, expert_parallel: how ranks share the model; see `RolloutConfig`.
            gpu_memory: share of each GPU's memory it takes (GPU only); None: vLLM's default.
            sleeps: whether it can give its memory away and take it back (GPU only).
            secret: every call but `/health` must bring it (`EngineClient.secret`); empty: none.
            port: to listen on; None: any that is free.
            part: what of the engine runs here; None: all. Other hosts run the rest.
            extra_args, extra_env: handed to vLLM as they are; they win.
        """
        self.model = Path(model)
        self.log_path = Path(log_path)
        self.host, self.port, self.device = host, port, device
        self.part, self.data = part, data
        self.process: subprocess.Popen[bytes] | None = None
        self._log_start = 0
        self._url: str | None = None
        self.coordinator = part.coordinator if part else ""
        """`host:port` where the parts of an engine meet; the first one's is known after `start`."""
        if return_routing:
            prefix_caching = device != "cpu"
        self._args = [
            *("--model", str(self.model), "--served-model-name", "policy", "--host", host),
            *("--dtype", dtype, "--max-model-len", str(max_model_len)),
            *("--max-num-seqs", str(max_num_seqs), "--seed", str(seed)),
            "--enable-prefix-caching" if prefix_caching else "--no-enable-prefix-caching",
            *("--weight-transfer-config", json.dumps({"backend": weight_transfer_backend})),
            *("--logprobs-mode", "processed_logprobs", "--generation-config", "vllm"),
            *("--enable-scale-out", "--skip-tokenizer-init"),
            "--disable-uvicorn-access-log",
            # On a GPU a watchdog sees by the statistics that a long answer grows; a step on a CPU
            # is too short to pay for them.
            *(["--enforce-eager", "--disable-log-stats"] if device == "cpu" else []),
            *(["--enable-return-routed-experts"] if return_routing else []),
            *(["--enable-sleep-mode"] if sleeps and device != "cpu" else []),
            *(["--gpu-memory-utilization", str(gpu_memory)] if gpu_memory else []),
            *("--tensor-parallel-size", str(tensor), "--pipeline-parallel-size", str(pipeline)),
            *("--data-parallel-size", str(data)),
            *(["--enable-expert-parallel"] if expert_parallel else []),
            *(["--middleware", MIDDLEWARE] if secret else []),
            *extra_args,
        ]
        ranks = tensor * pipeline * (part.copies(data) if part else data)
        self._env = engine_environment(device, max(1, num_threads // ranks), kv_cache_gib)
        if return_routing and device != "cpu":
            self._env["VLLM_USE_V2_MODEL_RUNNER"] = "1"
        self._env |= engine_part.environment(host) if part else {}
        self._env[admission.SECRET] = secret  # also where it is empty: the user's own is not for us
        self._env |= extra_env or {}

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
        command = [sys.executable, "-m", "megatron_r1.rollout.vllm_plugin.serve", *self._args]
        command += self._where_to_listen()
        if self.part is not None:
            command += engine_part.arguments(self.part, self.data, self.coordinator)
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as log:
            self._log_start = log.tell()
            self.process = subprocess.Popen(
                command,
                env=os.environ | self._env | {lifetime.PARENT: str(os.getpid())},
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
        if self.is_alive():
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_GRACE_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        # A process in the kernel's hands, of a driver that hangs, does not end even so.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(KILL_SECONDS)

    def describe_end(self) -> str:
        """How the process ended and what its log says, root cause first."""
        code = self.process.poll() if self.process else None
        how = (
            f"signal {signal.Signals(-code).name}"
            if code is not None and code < 0
            else f"exit code {code}"
        )
        return f"{how}; from {self.log_path}:\n{self.log_excerpt()}"

    def _where_to_listen(self) -> list[str]:
        """Choose the ports; vLLM's argument."""
        if self.part is not None and not self.part.serves:
            self._url = ""
            return []
        port = self.port or free_port(self.host)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as vLLM's own does
            probe.bind((self.host, port))
            if self.part is not None:  # while this port is taken: it has to be another
                host = socket.gethostbyname(self.host)  # ZeroMQ listens at no name
                self.coordinator = f"{host}:{free_port(host)}"
        self._url = f"http://{self.host}:{port}"
        return ["--port", str(port)]

    def log_excerpt(self) -> str:
        """The root cause and the last lines of what this process wrote."""
        with self.log_path.open("rb") as log:
            log.seek(self._log_start)
            text = log.read(EXCERPT_BYTES)
            # An engine that dies with hundreds of requests says the same for each of them.
            end = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start + len(text), end - EXCERPT_BYTES))
            return excerpt((text + log.read()).decode(errors="replace"))


def excerpt(log: str, num_last_lines: int = 5) -> str:
    """The first line that names an error (later ones are its echoes), then the last lines."""
    told = [line for line in log.splitlines() if not NOISE.search(line)]
    lines = [LOG_PREFIX.sub("", line).rstrip() for line in told]
    lines = [line for line in lines if line.strip(" ^~")]
    cause = next((m.group(1) for line in lines if (m := ERROR_LINE.search(line))), None)
    last = lines[-num_last_lines:]
    shown = ([cause] if cause else []) + [line for line in last if not cause or cause not in line]
    return "\n".join(f"  {line[:LINE_CHARS]}" for line in shown) or "  (the log is empty)"


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


def engine_environment(device: str, num_threads: int, kv_cache_gib: int) -> dict[str, str]:
    """Environment variables of an engine, over those of this process."""
    env = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_SERVER_DEV_MODE": "1",  # pause, resume and the weight-transfer calls exist only then
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "PYTHONUNBUFFERED": "1",
    }
    if device == "cpu":
        env |= {
            "VLLM_CPU_KVCACHE_SPACE": str(kv_cache_gib),
            # The model runs inside the engine core: one process and two copies per step less.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(num_threads),
            # Threads that wait for work must not spin: the trainer computes on the same cores.
            "OMP_WAIT_POLICY": "passive",
            # vLLM compiles a function that ranks the sampled token; nobody asks for ranks, and gcc
            # takes 20 s.
            "TORCHDYNAMO_DISABLE": "1",
        }
    return env
