"""Layers that Megatron-Core lacks on a CPU, or has wrong."""

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import Tensor

from megatron_r1.models.gradients import mark_sequence_parallel


class RMSNorm(torch.nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, with the interface of Megatron's norms, and a derivative
    written by hand: a third of autograd's memory traffic.

    10,700 tokens x 128 features, fp32, forward and backward on one core: 7 ms, where autograd takes
    21 ms and torch.nn.functional.rms_norm 12 ms.

    The mean is computed in fp32 and the product with the weight in the input's dtype, as in
    transformers. Megatron's own (WrappedTorchNorm) does not support sequence parallelism.

    Args:
        config: the model's, for the weight's dtype and sequence parallelism.
        hidden_size: the features of a token, over which the mean is taken.
        eps: added to the mean of squares."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        mark_sequence_parallel(self.weight, config)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized activations.

        Args:
            x: (s, b, hidden_size) or (..., hidden_size), any float dtype.

        Returns:
            The same shape and dtype."""
        return _Normalize.apply(x, self.weight, self.eps)


class _Normalize(torch.autograd.Function):
    """RMS normalization y = w n, with n = x / r and r = sqrt(mean(x^2) + eps).

    So, with u = w dy, dw = sum(n dy) over rows and dx = (u - n mean(u n)) / r.

    x, dy (..., hidden_size) in any float dtype, w (hidden_size,); means are in fp32. Saved: n in
    x's dtype, 1 / r (..., 1) in fp32, and w."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x_fp32 = x.float()
        scale = x_fp32.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        normalized_x = (x_fp32 * scale).to(x.dtype)
        ctx.save_for_backward(normalized_x, scale, weight)
        return weight * normalized_x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        normalized_x, scale, weight = ctx.saved_tensors
        product = grad.float() * normalized_x
        d_weight = product.flatten(0, -2).sum(0).to(weight.dtype)
        mean = product.mul_(weight).mean(-1, keepdim=True)
        d_x = torch.addcmul(grad.float() * weight, normalized_x.float(), mean, value=-1)
        return d_x.mul_(scale).to(grad.dtype), d_weight, None


class ReplicatedLinear(torch.nn.Module):
    """y = x W^T, all of W on every tensor-parallel rank: TELinear's parallel_mode "duplicated".

    Args:
        input_size: the features of x.
        output_size: the features of y.
        config: the model's, for the weight's dtype, device and initial values."""

    def __init__(self, input_size: int, output_size: int, config: TransformerConfig):
        super().__init__()
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(
            torch.empty(output_size, input_size, dtype=config.params_dtype, device=device)
        )
        if config.perform_initialization:
            config.init_method(self.weight)
        mark_sequence_parallel(self.weight, config)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """Return the layer's product.

        Args:
            x: (s, b, input_size).

        Returns:
            (s, b, output_size) and no bias, as Megatron's linear layers."""
        return self._forward_impl(x, self.weight), None

    def _forward_impl(self, input: Tensor, weight: Tensor) -> Tensor:
        # Named as in Megatron's layers: FP8 emulation replaces this method.
        return torch.nn.functional.linear(input, weight)


class LatentAttention(MLASelfAttention):
    """MLASelfAttention whose down-projections are whole on every rank, as with Transformer Engine.

    With Megatron's own column-parallel layers the gradient of the shared rotary key is wrong for
    tensor_parallel > 1: each rank's heads contribute to it, and
    gather_from_tensor_model_parallel_region does not sum the contributions
    (multi_latent_attention.py:738, Megatron-Core 0.19.2). Behind a replicated projection, the
    backward pass of the gather over the sequence sums them."""

    def __init__(self, config: MLATransformerConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        latent_size = config.kv_lora_rank + config.qk_pos_emb_head_dim
        self.linear_kv_down_proj = ReplicatedLinear(config.hidden_size, latent_size, config)
        if config.q_lora_rank is not None:
            self.linear_q_down_proj = ReplicatedLinear(
                config.hidden_size, config.q_lora_rank, config
            )


class ExpertOutput(tensor_parallel.RowParallelLinear):
    """An expert's second layer, whose output may be changed in place.

    With one rank along every axis Megatron's passes it through a reduction that returns its
    argument, to which autograd allows no bias to be added (mlp.py:354, Megatron-Core 0.19.2)."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.explicit_expert_comm = True
