"""What unit tests share."""

from pathlib import Path

import pytest
from cuda_toolkit import write_toolkit


@pytest.fixture(scope="session")
def cuda_home(tmp_path_factory) -> Path:
    return write_toolkit(tmp_path_factory.mktemp("cuda"))


@pytest.fixture(autouse=True)
def whole_toolkit(cuda_home, monkeypatch) -> None:
    """Engines for GPUs are not refused for half a toolkit on this machine."""
    monkeypatch.setenv("CUDA_HOME", str(cuda_home))
