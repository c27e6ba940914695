"""A real vLLM server of a reward model."""

import contextlib
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from megatron_r1.base.processes.children import free_port
from megatron_r1.engines.server.environment_variables import engine_environment


@contextlib.contextmanager
def pooling_server(model: Path, name: str = "rm"):
    """Serves the folder `model` as `name`, in fp32; yields the server's address."""
    port = free_port("127.0.0.1")
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", name, "--runner", "pooling", "--dtype", "float32"]
    command += ["--max-model-len", "256", "--enforce-eager", "--host", "127.0.0.1"]
    log_path = model.parent / "server.log"
    environment = os.environ | engine_environment("cpu", 1, 1)
    with log_path.open("wb") as log:
        server = subprocess.Popen(
            [*command, "--port", str(port)], env=environment, stdout=log, stderr=log
        )
    try:
        address = f"http://127.0.0.1:{port}"
        while True:
            assert server.poll() is None, log_path.read_text()
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
