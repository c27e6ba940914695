"""One import of vLLM and one of Megatron-Core for all workers of a test run.

Engines and trainer ranks of the tests are forked from two servers that the run starts, where it has
several workers; the product has them for one run (`base.processes.fork_client`)."""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

SYSTEM = Path(__file__).parents[1] / "system"
_servers = contextlib.ExitStack()
PROCESSES = "R1_TEST_FORK_SERVERS"
"""Environment variable: process ids of the servers, for the watchdog of each worker."""


@contextlib.contextmanager
def shared_server(
    module: str, folder: Path, environment: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a fork server for processes that have `SERVERS` set to `folder`, until the end of the
    block. It imports `module` meanwhile, and ends with this process.

    Args:
        module: the module that is imported.
        folder: where the server's sockets are.
        environment: variables over those of this process."""
    from megatron_r1.base.processes import children

    # Of NumPy's threads, which would make a fork unsafe, there is none.
    options = children.popen_options({"OPENBLAS_NUM_THREADS": "1", **environment})
    options |= {"stdin": subprocess.PIPE}
    command = [sys.executable, "-m", "megatron_r1.base.processes.fork_server", module]
    with subprocess.Popen([*command, str(folder / module)], **options) as server:
        try:
            while not (folder / module).exists() and server.poll() is None:
                time.sleep(0.02)
            yield server
        finally:
            children.kill(server)
            (folder / module).unlink(missing_ok=True)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Start the servers before the workers, which inherit the environment."""
    if not getattr(session.config.option, "numprocesses", None):
        return
    from megatron_r1.base.processes.fork_server import SERVERS
    from megatron_r1.controller.trainer_calls.rank_processes import RANK_MODULE as RANK
    from megatron_r1.controller.trainer_calls.rank_processes import import_environment
    from megatron_r1.engines.server.environment_variables import engine_environment
    from megatron_r1.engines.server.server import SERVER_MODULE as ENGINE

    # What all processes of the tests share: a process with another environment is not forked.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(SYSTEM), os.environ.get("PYTHONPATH", "")])
    os.environ["PYTHONWARNINGS"] = "ignore"
    folder = Path(_servers.enter_context(tempfile.TemporaryDirectory(prefix="f")))
    temporary = {"TMPDIR": str(folder)}  # of packages that make folders when they are imported
    started = [
        _servers.enter_context(shared_server(module, folder, environment | temporary))
        for module, environment in (
            (ENGINE, engine_environment("cpu", 2, 1)),
            (RANK, import_environment()),
        )
    ]
    os.environ[SERVERS] = str(folder)
    os.environ[PROCESSES] = " ".join(str(process.pid) for process in started)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """End the servers, and what they have started."""
    _servers.close()
