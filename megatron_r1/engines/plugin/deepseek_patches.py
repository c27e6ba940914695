"""Patches of vLLM's classes of DeepSeek's models and of MTP layers, on every platform. Paths are
below vllm/."""

import functools
import sys
from typing import Any

import torch

DEEPSEEK_MODELS = "vllm.model_executor.models.deepseek_v2"
MTP_MODELS = (
    "vllm.model_executor.models.deepseek_mtp",
    "vllm.model_executor.models.glm4_moe_mtp",
)
RELEASED_EPSILON = 1e-6


def correct_deepseek_classes() -> None:
    """Make both patches as soon as a model class has been loaded and `DEEPSEEK_MODELS` is
    imported.

    Importing it here would cost every process of a server that runs no model some seconds."""
    from vllm.model_executor.models import registry

    upstream = registry._LazyRegisteredModel.load_model_cls

    def load_model_cls(self: Any) -> Any:
        model = upstream(self)
        if DEEPSEEK_MODELS in sys.modules:
            _correct_classes(sys.modules[DEEPSEEK_MODELS])
        for name in MTP_MODELS:
            if name in sys.modules:
                load_copies_into_drafters(sys.modules[name])
        return model

    registry._LazyRegisteredModel.load_model_cls = load_model_cls


@functools.cache  # a second call would wrap each patch in itself
def _correct_classes(models: Any) -> None:
    gather_single_tokens(models.DeepseekV2DecoderLayer)
    for attention in (models.DeepseekV2Attention, models.DeepseekV2MLAAttention):
        _use_released_epsilon(attention)


@functools.cache
def load_copies_into_drafters(models: Any) -> None:
    """Let loaders of MTP layers fill the copies of experts that vLLM's balancer places.

    Upstream: model_executor/models/deepseek_mtp.py: `DeepSeekMTP.load_weights`, and
    model_executor/models/glm4_moe_mtp.py: `Glm4MoeMTP.load_weights`, map the model's experts to
    slots and leave out the redundant ones, which DeepseekV2ForCausalLM does not. Without it:
    copies compute drafts with uninitialized memory, and a push is refused, because it fills only a
    part of a tensor. Goes when: upstream passes `num_redundant_experts`.

    Args:
        models: the module.
    """
    upstream = models.fused_moe_make_expert_params_mapping

    def with_copies(model: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs.setdefault("num_redundant_experts", getattr(model, "num_redundant_experts", 0))
        return upstream(model, *args, **kwargs)

    models.fused_moe_make_expert_params_mapping = with_copies


def gather_single_tokens(layer: Any) -> None:
    """Give whole hidden states on from a layer whose batch is one token.

    Upstream: model_executor/models/deepseek_v2.py: `DeepseekV2DecoderLayer.forward` and
    `DeepseekV2Model.forward` (vllm-project/vllm #50154, pull request #50691). With
    rollout.tensor_parallel, .data_parallel and .expert_parallel the ranks of a tensor group hold
    shares of the tokens behind such a layer, which the next layer recognizes by their number.
    Without the patch: one token is padded to the group's size, so that a share has one row, too,
    and counts as the whole: all ranks but the first go on with padding, and the log-probabilities
    of a data rank's last sequence are off by 0.1 to 2 wherever the model runs eagerly. Goes when:
    layers say what they return."""
    from vllm.distributed import tensor_model_parallel_all_gather

    upstream = layer.forward

    def forward(
        self: Any, positions: torch.Tensor, *states: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden_states, residual = upstream(self, positions, *states, **kwargs)  # drafters name them
        if self.use_sequence_parallel_moe and positions.shape[0] == 1:
            # Over the tensor group: its first rank holds the token, the others the padding.
            pair = torch.cat([hidden_states, residual], dim=-1)
            pair = tensor_model_parallel_all_gather(pair, 0)[:1]
            hidden_states, residual = pair.split(self.hidden_size, dim=-1)
        return hidden_states, residual

    layer.forward = forward


def _use_released_epsilon(attention: Any) -> None:
    """Give the norms of latent attention the epsilon that the models were released with.

    Upstream: model_executor/models/deepseek_v2.py: `DeepseekV2Attention.__init__` and
    `DeepseekV2MLAAttention.__init__`. The released code of DeepSeek-V2, V3, Moonlight and Kimi-K2
    and transformers' classes use 1e-6 in these norms whatever rms_norm_eps is; vLLM uses
    rms_norm_eps, 1e-5 for Moonlight and GLM-4.7-Flash. Goes when: vLLM does as they do."""
    upstream = attention.__init__

    @functools.wraps(upstream)
    def construct(self: Any, *args: Any, **kwargs: Any) -> None:
        upstream(self, *args, **kwargs)
        for name in ("q_a_layernorm", "kv_a_layernorm"):
            if hasattr(self, name):
                getattr(self, name).variance_epsilon = RELEASED_EPSILON

    attention.__init__ = construct
