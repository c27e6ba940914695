"""A reward model or a critic: Megatron's GPTModel, whose last stage returns one number per token.

The head is one row of weights, whole on every tensor-parallel rank. Under sequence parallelism each
rank multiplies its own part of the tokens and only the scores are gathered, so that each gradient
counts once: that of the hidden states is cut to the rank's own tokens, that of the head is summed
over the tensor ranks like a norm's (`models.gradients`).

Shapes: s tokens, b batches (1 for a packed batch), h hidden size. Inside the model tensors have
Megatron's order (s, b, h)."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import MegatronModule, TransformerConfig
from torch import Tensor

from megatron_r1.models.expert_exchange_overlap import SchedulableModel
from megatron_r1.models.gradients import mark_sequence_parallel


class ScoreHead(MegatronModule):
    """The score head.

    Attributes:
        weight: (1, h) in the model's dtype."""

    def __init__(self, config: TransformerConfig, tp_group: torch.distributed.ProcessGroup):
        super().__init__(config)
        self.weight = torch.nn.Parameter(
            torch.zeros(1, config.hidden_size, dtype=config.params_dtype)
        )
        mark_sequence_parallel(self.weight, config)
        self.tp_group = tp_group

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the score at every position.

        Args:
            hidden: (s, b, h), under sequence parallelism this rank's part of s.

        Returns:
            (s, b) whole, fp32 as in vLLM's pooling heads."""
        scores = hidden.float() @ self.weight[0].float()
        if not self.config.sequence_parallel:
            return scores
        # Over the tensor group. Every rank computes the same loss from the gathered scores, so
        # their gradients are equal and must not be summed.
        return gather_from_sequence_parallel_region(
            scores, tensor_parallel_output_grad=False, group=self.tp_group
        )


class ScoreModel(SchedulableModel):
    """GPTModel that returns scores (b, s) fp32 from its last stage, behind the final norm."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.unpadded_vocab_size = self.vocab_size
        if self.post_process:
            self.score = ScoreHead(self.config, self.output_layer.tp_group)
            del self.output_layer  # of the vocabulary's size, and without a use

    def _postprocess(self, hidden_states: Tensor, **context: Any) -> Tensor:
        if not self.post_process:
            return hidden_states
        return self.score(hidden_states).transpose(0, 1).contiguous()

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """Skip GPTModel's version, which handles an output layer and tied embeddings; arguments and
        result are those of Megatron's module."""
        return MegatronModule.sharded_state_dict(self, prefix, sharded_offsets, metadata)
