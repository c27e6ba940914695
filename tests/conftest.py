"""What all tests share: paths, interpreted Triton kernels, seeds, limits and fork servers.

Shared modules are in `harness`, which is on the path; the limits are the watchdog against hangs
and a limit of time; there are fork servers where there are several workers.

Triton looks at TRITON_INTERPRET when it is first imported, which may be any test's doing. Without a
GPU the tests' own process interprets; the variable itself is not left to what they start."""

import gc
import os
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

gc.disable()  # until all tests are imported, with what they import; see pytest_collection_finish

# torch looks up the name of every address that a store's connection has, 127.0.0.1 too. A resolver
# that drops one of many queries at once, as of a machine without a network, costs 5 s each time.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")

import pytest  # noqa: E402
import time_limit  # noqa: E402
import torch  # noqa: E402
from first_cases import mark_later_cases  # noqa: E402
from fork_servers import pytest_sessionfinish, pytest_sessionstart  # noqa: E402, F401
from time_limit import pytest_configure, pytest_runtest_setup  # noqa: E402, F401
from watchdog import pytest_runtest_protocol  # noqa: E402, F401


def import_interpreting_triton() -> None:
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language  # noqa: F401

    if before is None:
        del os.environ["TRITON_INTERPRET"]


if find_spec("triton") and not torch.cuda.is_available():
    import_interpreting_triton()


@pytest.hookimpl(tryfirst=True)  # pytest deselects by marks in a hook of its own
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark_later_cases(items)
    time_limit.pytest_collection_modifyitems(items)


def pytest_collection_finish() -> None:
    """Collect garbage from now on, but not what was imported: a quarter of a collection's time."""
    gc.freeze()
    gc.enable()


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A temporary folder with a short name, as paths of sockets have 107 bytes. Processes that are
    killed have it as TMPDIR, which they do not tidy."""
    with tempfile.TemporaryDirectory(prefix="t", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Random tensors of a test do not depend on the tests before it."""
    torch.manual_seed(0)
