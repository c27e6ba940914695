"""Patches of vLLM 0.32's CPU build for block-wise FP8 models.

Without them tests/system/test_push_fp8_engine.py fails.
"""

from typing import Any

import torch


def apply() -> None:
    """Apply both patches. On CPU, once."""
    allow_cpus_without_amx()
    pass_bias_as_float32()


def allow_cpus_without_amx() -> None:
    """Let CPUs with AVX-512 and bf16 compute FP8 models; activations stay in bf16 there.

    Upstream: model_executor/kernels/linear/scaled_mm/cpu.py:236 (`CPUFp8BlockScaledMMKernel`) and
    layers/fused_moe/experts/cpu_moe.py:456 (`CPUExpertsFp8`). Without it: both refuse CPUs without
    AMX, although their operators have a slower path with the same results. Goes when: they accept
    such CPUs.
    """
    from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUFp8BlockScaledMMKernel
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUExpertsFp8

    if torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported():
        supported = classmethod(lambda cls, capability=None: (True, None))
        CPUFp8BlockScaledMMKernel.is_supported = supported
        CPUExpertsFp8._supports_current_device = staticmethod(lambda: True)


def pass_bias_as_float32() -> None:
    """Give the FP8 product a bias in fp32.

    Upstream: model_executor/kernels/linear/scaled_mm/cpu.py:306 (`apply_weights`). Without it: it
    passes a bias in bf16, which the operator refuses. Goes when: it converts the bias.
    """
    from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUFp8BlockScaledMMKernel

    upstream = CPUFp8BlockScaledMMKernel.apply_weights

    def apply_weights(
        self: Any,
        layer: torch.nn.Module,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
        **named: object,
    ) -> torch.Tensor:
        return upstream(self, layer, x, None if bias is None else bias.float(), **named)

    CPUFp8BlockScaledMMKernel.apply_weights = apply_weights
