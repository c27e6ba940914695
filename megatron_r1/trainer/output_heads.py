"""The heads behind the last stage's output: a policy's log-probabilities and losses, or the scores
of a score model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_r1 import models
from megatron_r1.config.loss_settings import LossSettings
from megatron_r1.models.gradients import fp32_main_grad
from megatron_r1.models.hf_config import HFConfig, has_score_head
from megatron_r1.trainer.batch import PackedMicrobatch
from megatron_r1.trainer.loss_head import LossHead
from megatron_r1.trainer.losses import Loss, LossSum


@dataclass(frozen=True)
class ScoreHeadOutput:
    """The output of a score head for one micro-batch.

    A reward model's score of a text is read at its last token. That position may be on any rank of
    the context group. All these ranks compute the same loss from the same scores; the gradient
    reaches the rank that has the position, and the sample is counted on the first context rank
    (`PackedMicrobatch.num_responses`).

    Attributes:
        batch: the micro-batch, whose samples say which tokens are a text's last.
        token_scores: (T,) fp32, the score after each token of this rank.
        context_group: the ranks that hold the other tokens.
    """

    batch: PackedMicrobatch
    token_scores: Tensor
    context_group: ProcessGroup

    def last_token_scores(self) -> Tensor:
        """Return the scores (S,) fp32 at the last token of each sample, on every context rank."""
        positions = self.batch.last_token_positions
        local_scores = torch.where(positions >= 0, self.token_scores[positions.clamp(min=0)], 0.0)
        # Over the context group: of each sample one rank has the score, the others 0. Megatron's
        # "tensor" region sums over any group in the forward pass and is the identity backward.
        return reduce_from_tensor_model_parallel_region(local_scores, group=self.context_group)


class OutputHeads:
    """Functions of a micro-batch and the last stage's output `out`: hidden states (1, T, H) of a
    policy or scores (1, T) of a score model. With their first arguments bound they are
    `passes.OutputFunction`."""

    def __init__(
        self,
        model_chunks: Sequence[nn.Module],
        hf_config: HFConfig,
        groups: ProcessGroupCollection,
    ):
        """Take the model whose output layer is used.

        Args:
            model_chunks: this rank's chunks; the last one has the output layer.
            hf_config: the model's `config.json`.
            groups: the process groups of the rank."""
        self._model_chunks, self._hf_config, self._groups = model_chunks, hf_config, groups

    def store_logprobs(
        self, name: str, temperature: float, batch: PackedMicrobatch, out: Tensor
    ) -> None:
        """Store the log-probabilities of the response tokens as `batch.logprobs[name]`.

        Args:
            name: the key in `PackedMicrobatch.logprobs`.
            temperature: the logits are divided by it.
            batch: the micro-batch.
            out: (1, T, H), its hidden states."""
        batch.logprobs[name] = self._loss_head(batch, out, temperature).logprobs()[0]

    def loss(
        self,
        loss: Loss,
        settings: LossSettings | None,
        temperature: float,
        batch: PackedMicrobatch,
        out: Tensor,
    ) -> LossSum:
        """Return the loss of a micro-batch.

        Args:
            loss: the function that computes it.
            settings: the settings of a policy loss; None for the others.
            temperature: the logits are divided by it.
            batch: the micro-batch.
            out: (1, T, H), its hidden states, or (1, T), its scores."""
        if has_score_head(self._hf_config):
            scores: Any = self.scores(batch, out)
            return loss(batch, scores, settings)
        is_policy = settings is not None
        return loss(
            batch, self._loss_head(batch, out, temperature, stores_old_logprobs=is_policy), settings
        )

    def scores(self, batch: PackedMicrobatch, out: Tensor) -> ScoreHeadOutput:
        """Return a score model's scores, `out` (1, T), of a micro-batch."""
        return ScoreHeadOutput(batch, out.view(-1), self._groups.cp)

    def _loss_head(
        self,
        batch: PackedMicrobatch,
        out: Tensor,
        temperature: float,
        *,
        stores_old_logprobs: bool = False,
    ) -> LossHead:
        weight = models.lm_head_weight(self._model_chunks[-1])
        return LossHead(
            batch,
            hidden=out.reshape(-1, out.shape[-1]),
            weight=weight,
            temperature=temperature,
            tensor_group=self._groups.tp,
            vocab_size=self._hf_config["vocab_size"],
            context_group=self._groups.cp,
            main_grad=fp32_main_grad(weight),
            stores_old_logprobs=stores_old_logprobs,
        )
