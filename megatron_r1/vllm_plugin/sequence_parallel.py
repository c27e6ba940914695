"""A patch of vLLM 0.32, on every platform, for DeepSeek's experts over tensor and data ranks."""

import functools
from typing import Any

import torch

from megatron_r1.vllm_plugin.model_classes import when_loaded

MODELS = "vllm.model_executor.models.deepseek_v2"


def gather_single_tokens() -> None:
    """Give whole hidden states on from a layer whose batch is one token.

    Upstream: model_executor/models/deepseek_v2.py:1363, 1402, 1552 and 1578 (vllm-project/vllm
    #50154, pull request #50691). With rollout.tensor, .data and .expert_parallel the ranks of a
    tensor group hold shares of the tokens behind such a layer, which the next layer recognizes by
    their number. Without the patch: one token is padded to the group's size, so that a share has
    one row, too, and counts as the whole: all ranks but the first go on with padding, and the
    log-probabilities of a data rank's last sequence are off by 0.1 to 2 wherever the model runs
    eagerly. Goes when: layers say what they return.
    """
    when_loaded(MODELS, lambda models: _patch(models.DeepseekV2DecoderLayer))


@functools.cache  # a second call would wrap the patch in itself
def _patch(layer: Any) -> None:
    from vllm.distributed import tensor_model_parallel_all_gather

    upstream = layer.forward

    def forward(self: Any, positions: torch.Tensor, *states: Any, **named: Any) -> tuple:
        hidden_states, residual = upstream(self, positions, *states, **named)  # drafters name them
        if self.use_sequence_parallel_moe and positions.shape[0] == 1:
            # Over the tensor group: its first rank holds the token, the others the padding.
            both = torch.cat([hidden_states, residual], dim=-1)
            both = tensor_model_parallel_all_gather(both, 0)[:1]
            hidden_states, residual = both.split(self.hidden_size, dim=-1)
        return hidden_states, residual

    layer.forward = forward
