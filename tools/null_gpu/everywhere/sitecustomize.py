"""Makes torch's operators compute on the null GPU from a process's beginning.

Python imports this first, also in processes that such a process starts: trainer ranks, engines, and
tests that know nothing of it. Nothing is imported for it: what is imported is changed when it
is."""

import ctypes
import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Callable
from typing import Any


class NullRuntime(ctypes.CDLL):
    """vLLM calls some functions of the CUDA runtime by name, in the library that it finds loaded:
    the real one, whose place the preloaded one takes for linked calls only."""

    def __init__(self, name, *args, **kwargs):
        is_runtime = name is not None and "libcudart" in str(name)
        super().__init__(os.environ["LD_PRELOAD"] if is_runtime else name, *args, **kwargs)


def _compute_torch_on_host(module) -> None:
    import host_compute

    host_compute.record_python_operators()
    host_compute.compute_everywhere()


def _install_triton_interpreter(module) -> None:
    import triton_on_host

    triton_on_host.install()


def _transformer_engine(module) -> None:
    import transformer_engine_on_host

    transformer_engine_on_host.install()


def _use_our_attention(module) -> None:
    import transformer_engine_on_host

    transformer_engine_on_host.use_our_attention()


def _call_no_attention_early(module) -> None:
    module._call_attention = lambda *ignored: None  # ours has no kernel to compile


def _our_kernels(registry) -> None:
    in_torch = registry.load_primitives("torch")
    registry.load_primitives = lambda backend: in_torch


def _vllm_arguments(module) -> None:
    import vllm_on_host

    create = module.EngineArgs.create_engine_config

    def create_for_null_gpu(arguments, *args, **kwargs):
        vllm_on_host.configure(arguments)
        return create(arguments, *args, **kwargs)

    module.EngineArgs.create_engine_config = create_for_null_gpu


def _vllm_operators(module) -> None:
    import host_compute
    import vllm_on_host

    host_compute.KERNELS |= vllm_on_host.KERNELS


def _vllm_experts(module) -> None:
    import vllm_on_host

    module.invoke_fused_moe_triton_kernel = vllm_on_host.experts


def _deep_gemm(module) -> None:
    import vllm_on_host

    module.fp8_gemm_nt = vllm_on_host.deep_gemm_product
    module.m_grouped_fp8_gemm_nt_contiguous = vllm_on_host.deep_gemm_experts


def _no_flashinfer(module) -> None:
    """As where there is no nvcc: FlashInfer compiles for minutes what cannot run. vLLM then takes
    its own rotary embeddings, samplers and experts, and DeepGEMM."""
    module.has_flashinfer = lambda: False


def _no_cutlass(module) -> None:
    """The router's product is cuBLAS's: the other is compiled for a minute."""
    module.is_available = lambda: False


def _no_triton(module) -> None:
    """Top-k and top-p by torch's operators: interpreted kernels take seconds for every token."""
    module.HAS_TRITON = False


CHANGES: dict[str, Callable[..., Any]] = {
    "torch": _compute_torch_on_host,
    "triton.runtime.interpreter": _install_triton_interpreter,
    "transformer_engine.pytorch": _transformer_engine,
    "megatron.core.extensions.transformer_engine_spec_provider": _use_our_attention,
    "megatron_r1.trainer.first_steps": _call_no_attention_early,
    "r1_kernels.registry": _our_kernels,
    "vllm.engine.arg_utils": _vllm_arguments,
    "vllm.model_executor.kernels.linear.cute_dsl.ll_bf16": _no_cutlass,
    "vllm.model_executor.layers.fused_moe.fused_moe": _vllm_experts,
    "vllm.platforms": _vllm_operators,
    "vllm.utils.deep_gemm": _deep_gemm,
    "vllm.utils.flashinfer": _no_flashinfer,
    "vllm.v1.sample.ops.topk_topp_sampler": _no_triton,
}
"""Module → what is called with it when it has been imported."""


class ChangedModules(importlib.abc.MetaPathFinder):
    """Finds the modules of `CHANGES` where others find them, and changes them once they are
    there."""

    def find_spec(self, name, path=None, target=None):
        change = CHANGES.get(name)
        if change is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_change(module) -> None:
            execute(module)
            change(module)

        spec.loader.exec_module = execute_and_change
        return spec


ctypes.CDLL = NullRuntime
sys.meta_path.insert(0, ChangedModules())
