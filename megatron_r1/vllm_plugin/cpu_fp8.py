"""Block-wise FP8 models on CPUs: those without AMX, and layers with a bias.

Answers vllm/model_executor/kernels/linear/scaled_mm/cpu.py (`CPUFp8BlockScaledMMKernel`) and
vllm/model_executor/layers/fused_moe/experts/cpu_moe.py (`CPUExpertsFp8`), which refuse such CPUs,
although their operators have a path for AVX-512 with bf16 that gives the same results, slower.
The first also hands its operator a bias in bf16, where that wants fp32. Activations stay in bf16
there, unlike on a GPU. Goes when upstream has it; tests/system/test_push_fp8_engine.py fails
without.
"""

import torch


def mend() -> None:
    """Allow such CPUs, and such layers. On CPU, once."""
    from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUFp8BlockScaledMMKernel
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUExpertsFp8

    if torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported():
        able = classmethod(lambda cls, capability=None: (True, None))
        CPUFp8BlockScaledMMKernel.is_supported = able
        CPUExpertsFp8._supports_current_device = staticmethod(lambda: True)
    upstream = CPUFp8BlockScaledMMKernel.apply_weights

    def apply_weights(
        self: CPUFp8BlockScaledMMKernel,
        layer: torch.nn.Module,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
        **named: object,
    ) -> torch.Tensor:
        return upstream(self, layer, x, None if bias is None else bias.float(), **named)

    CPUFp8BlockScaledMMKernel.apply_weights = apply_weights
