"""The environment variables with which a vLLM server is started."""

import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path

import psutil

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.models.hf_config import HFConfig
from megatron_r1.models.weights.formats.published_layout import has_power_of_two_scales

SYSTEM_TOOLKIT = "/usr/local/cuda"
E8M0_VARIABLE = "VLLM_USE_DEEP_GEMM_E8M0"


def engine_environment(device: str, num_threads: int, kv_cache_gib: int) -> dict[str, str]:
    """Return the environment variables of any vLLM server that we start.

    Args:
        device: "cpu" or "cuda".
        num_threads: the threads of a rank of the engine, on a CPU.
        kv_cache_gib: memory of the KV cache on a CPU, GiB.
    """
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
            # Numba, which drafts n-grams, sets OpenMP's number of threads to its own. oneDNN then
            # multiplies wrongly by matrices that were packed with another number (AVX2, float32).
            "NUMBA_NUM_THREADS": str(num_threads),
            # Threads that wait for work must not spin: the trainer computes on the same cores.
            "OMP_WAIT_POLICY": "passive",
            # vLLM compiles a function that ranks the sampled token, which we do not use, and gcc
            # takes 20 s.
            "TORCHDYNAMO_DISABLE": "1",
        }
    else:
        env |= compiler_environment()
    return env


def compiler_environment() -> dict[str, str]:
    """Return the environment variables with which DeepGEMM and FlashInfer, in vLLM, find nvcc, its
    toolkit and ninja. The toolkit is CUDA_HOME's, if that is set, or the first whole one of this
    Python's environment, an nvcc on PATH and /usr/local/cuda.

    Raises:
        UserError: no toolkit that engines could find has nvcc with headers of its version."""
    path = os.environ.get("PATH", os.defpath)
    variable = "CUDA_HOME" if os.environ.get("CUDA_HOME") else "CUDA_PATH"
    homes = [os.environ.get(variable)]
    if not homes[0]:
        nvcc = shutil.which("nvcc", path=path)
        homes = [f"{sys.prefix}/cuda", nvcc and str(Path(nvcc).resolve().parents[1])]
        homes = [h for h in (*homes, SYSTEM_TOOLKIT) if os.path.exists(f"{h}/bin/nvcc")]
        variable = nvcc or f"{sys.prefix}/cuda"
    faults = {home: _toolkit_fault(home) for home in homes if home}
    for home, fault in faults.items():
        if not fault:
            return {"CUDA_HOME": home, "PATH": f"{sysconfig.get_path('scripts')}:{path}"}
    if faults:
        listing = "; ".join(f"{home}: {fault}" for home, fault in faults.items())
        raise UserError(
            f"{variable}: engines would compile with it, and it is of no whole CUDA toolkit "
            f"({listing}); set CUDA_HOME to one, or unset it and install with make setup-cuda",
            key="CUDA_HOME",
            cause=Cause.CONFLICT,
        )
    # The only kernel of FlashInfer's that vLLM takes without asking for nvcc.
    return {"VLLM_USE_FLASHINFER_SAMPLER": os.environ.get("VLLM_USE_FLASHINFER_SAMPLER", "0")}


def _toolkit_fault(home: str) -> str:
    """Return why nothing can be compiled with a CUDA toolkit, or "". Conda's has its headers in
    targets."""
    try:
        printed = subprocess.check_output([f"{home}/bin/nvcc", "--version"], text=True)
        includes = [Path(home, "include"), *Path(home).glob("targets/*/include")]
        header = next(
            (file for folder in includes if (file := folder / "cuda_runtime_api.h").exists()), None
        )
        if header is None:
            return f"{includes[0]}/cuda_runtime_api.h is not there"
    except (OSError, subprocess.CalledProcessError) as error:
        return str(error)
    compiler = re.findall(r"release (\d+)\.(\d+)", printed)
    headers = re.findall(r"#define CUDART_VERSION +(\d+)0(\d)0\b", header.read_text())
    of_compiler, of_headers = (" ".join(map(".".join, pairs)) for pairs in (compiler, headers))
    return (
        "" if compiler == headers else f"nvcc is of CUDA {of_compiler}, its headers of {of_headers}"
    )


def fp8_scale_environment(hf_config: HFConfig) -> dict[str, str]:
    """Return the environment variable that lets vLLM's dense layers keep the scales of pushed FP8
    blocks. By default vLLM rounds weights anew, to scales that are powers of two (0.32, envs.py:
    `VLLM_USE_DEEP_GEMM_E8M0`), and computes with other 8-bit values than the trainer.

    Args:
        hf_config: the model's `config.json`.
    """
    return {E8M0_VARIABLE: str(int(has_power_of_two_scales(hf_config)))}


def check_fp8_scales(hf_config: HFConfig) -> None:
    """Raise UserError where this process's environment asks vLLM for other FP8 scales than the
    push has.

    Args:
        hf_config: the model's `config.json`.
    """
    for name, value in fp8_scale_environment(hf_config).items():
        if os.environ.get(name, value) != value:
            kind = "powers of two" if value == "1" else "float32"
            raise UserError(
                f"{name}={os.environ[name]} in the environment: the scales of this push.fp8 are "
                f"{kind}, for which it is {value}; unset it",
                key="push.fp8",
                cause=Cause.CONFLICT,
            )


def network_environment(address: str) -> dict[str, str]:
    """Return the environment variables that make ranks on the host with this address reachable from
    other hosts.

    gloo would use the address that the host's name resolves to, on many hosts a loopback address.

    Raises:
        OSError: the name does not resolve.
    """
    address = socket.gethostbyname(address)
    interface = os.environ.get("GLOO_SOCKET_IFNAME")
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.family == socket.AF_INET and entry.address == address for entry in addresses):
            interface = interface or name
    return {"VLLM_HOST_IP": address} | ({"GLOO_SOCKET_IFNAME": interface} if interface else {})
