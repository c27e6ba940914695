"""Whether there is a GPU: as torch reports it, without torch."""

import shutil
import subprocess
import sys

import pytest
import torch

from megatron_r1.engines.server import gpu

VERSION = {True: "12.9", False: None}
DRIVER = """
int cuInit(unsigned flags) { return %d; }
int cuDeviceGetCount(int *count) { *count = %d; return 0; }
"""


def test_it_agrees_with_torch_and_does_not_import_it():
    program = (
        "import sys; from megatron_r1.engines.server import gpu; "
        "print(gpu.is_usable(), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == [str(torch.cuda.is_available()), "False"], done.stderr


@pytest.mark.skipif(shutil.which("gcc") is None, reason="apt-get install gcc")
@pytest.mark.parametrize(
    ("built_for_cuda", "status", "devices", "usable"),
    [(True, 0, 2, True), (True, 0, 0, False), (True, 100, 2, False), (False, 0, 2, False)],
)
def test_torch_is_built_for_it_and_the_driver_shows_one(
    tmp_path, built_for_cuda, status, devices, usable
):
    library = tmp_path / "driver.so"
    compiler = ["gcc", "-shared", "-x", "c", "-", "-o", str(library)]
    subprocess.run(compiler, input=DRIVER % (status, devices), text=True, check=True)
    package = tmp_path / "torch"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "version.py").write_text(f"cuda = {VERSION[built_for_cuda]!r}\n")
    program = "; ".join(
        [
            f"import sys; sys.path.insert(0, {str(tmp_path)!r})",
            "from megatron_r1.engines.server import gpu",
            f"gpu.DRIVER_LIBRARY = {str(library)!r}",
            "print(gpu.is_usable())",
        ]
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == str(usable), done.stderr


def test_no_driver_is_no_gpu(monkeypatch):
    monkeypatch.setattr(gpu, "DRIVER_LIBRARY", "libnosuchdriver.so.9")
    assert gpu._count_devices() == 0
