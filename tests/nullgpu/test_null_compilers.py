"""What vLLM compiles at run time is compiled by the toolkit that an engine gets, for an H100."""

import os
import struct
import sys
from pathlib import Path

import pytest

from megatron_r1.engines.server.settings import EngineSettings

DEEP_GEMM = """
import torch
from vllm.third_party import deep_gemm
x, w = (torch.empty(rows, 512, dtype=torch.float8_e4m3fn, device="cuda") for rows in (128, 256))
scales = torch.ones(128, 4, device="cuda"), torch.ones(2, 4, device="cuda")
out = torch.empty(128, 256, dtype=torch.bfloat16, device="cuda")
deep_gemm.fp8_gemm_nt((x, scales[0]), (w, scales[1]), out, disable_ue8m0_cast=True)
"""
# What engines of DeepSeek's models begin with.
FLASHINFER = "from flashinfer.jit.rope import gen_rope_module as m; m().build_and_load()"
EM_CUDA, FAT_BINARY, ELF = 190, struct.pack("<I", 0xBA55ED50), 2


@pytest.fixture
def of_an_engine(monkeypatch) -> dict[str, str]:
    """An engine's variables where nothing points to a toolkit but the installation."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    folders = os.environ["PATH"].split(":")
    without = ":".join(folder for folder in folders if not Path(folder, "nvcc").exists())
    monkeypatch.setenv("PATH", without)
    variables = EngineSettings(device="cuda").environment()
    assert variables["CUDA_HOME"] == f"{sys.prefix}/cuda"
    return variables


def is_for_hopper(cubin: bytes) -> bool:
    """Whether this is compiled code of CUDA for sm_90 with the instructions of that alone."""
    machine = struct.unpack_from("<H", cubin, 18)[0]
    return cubin[:4] == b"\x7fELF" and machine == EM_CUDA and b"-arch sm_90a " in cubin


def cubins(library: bytes) -> list[bytes]:
    """Return the compiled code for GPUs in a library, which is not compressed there."""
    found, start = [], library.find(FAT_BINARY)
    while start >= 0:
        entry = start + struct.unpack_from("<H", library, start + 6)[0]
        kind, _, header, size = struct.unpack_from("<HHIQ", library, entry)
        assert kind == ELF
        found.append(library[entry + header : entry + header + size])
        start = library.find(FAT_BINARY, entry)
    return found


def test_deep_gemm_compiles_with_an_engines_toolkit(on_null_gpu, of_an_engine, tmp_path):
    on_null_gpu("-c", DEEP_GEMM, **of_an_engine, DG_JIT_CACHE_DIR=str(tmp_path))
    compiled = {file.parent.name.split(".")[0]: file for file in tmp_path.rglob("*.cubin")}
    assert any(name.startswith("sm90_fp8_gemm") for name in compiled)
    assert all(is_for_hopper(file.read_bytes()) for file in compiled.values())


def test_flashinfer_compiles_and_links_with_it(on_null_gpu, of_an_engine, tmp_path):
    folder = {"FLASHINFER_WORKSPACE_BASE": str(tmp_path)}
    plain = {"FLASHINFER_EXTRA_CUDAFLAGS": "--no-compress"}
    on_null_gpu("-c", FLASHINFER, **of_an_engine, **folder, **plain)
    (library,) = tmp_path.rglob("rope.so")
    found = cubins(library.read_bytes())
    assert found and all(map(is_for_hopper, found))


def test_without_the_toolkit_deep_gemm_does_not_compile(on_null_gpu, of_an_engine, tmp_path):
    lacks = of_an_engine | {"CUDA_HOME": str(tmp_path)}
    with pytest.raises(pytest.fail.Exception, match="nvcc"):
        on_null_gpu("-c", DEEP_GEMM, **lacks, DG_JIT_CACHE_DIR=str(tmp_path / "cache"))
