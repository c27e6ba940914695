"""Block-wise FP8 models on CPUs without AMX.

Answers vllm/model_executor/kernels/linear/scaled_mm/cpu.py (`CPUFp8BlockScaledMMKernel`) and
vllm/model_executor/layers/fused_moe/experts/cpu_moe.py (`CPUExpertsFp8`), which refuse such CPUs,
although their operators have a path for AVX-512 with bf16 that gives the same results, slower.
Activations stay in bf16 there, unlike on a GPU. Goes when upstream asks for what it needs;
tests/system/test_push_fp8_engine.py fails without it.
"""

import torch
from vllm.platforms import current_platform


def multiply_without_amx() -> None:
    """Allow both. Safe to call again."""
    if not current_platform.is_cpu() or torch.cpu._is_amx_tile_supported():
        return
    if not torch.cpu._is_avx512_bf16_supported():
        return
    from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUFp8BlockScaledMMKernel
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUExpertsFp8

    CPUFp8BlockScaledMMKernel.is_supported = classmethod(lambda cls, capability=None: (True, None))
    CPUExpertsFp8._supports_current_device = staticmethod(lambda: True)
