"""The LM head as a loss sees it.

It gives log-probabilities, or a whole policy loss with its gradients. Only response tokens pass
through it; prompts and padding cost nothing there. Importing it needs no Megatron."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from r1_kernels import (
    Averaging,
    LinearPolicyLoss,
    PolicySettings,
    SamplingMask,
    TokenTensors,
    linear_policy_loss_from_settings,
    linear_token_logprobs,
)
from r1_kernels.arguments import trusted_values
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_r1.config.loss_settings import RatioLevel
from megatron_r1.trainer.batch import PackedMicrobatch


class TokenAveraging(NamedTuple):
    """What a response token weighs in a micro-batch's sum (`losses.make_token_averaging`).

    Attributes:
        response_weights: (T,) bool or fp32, the response tokens or their weights.
        average: "token", or "sequence" for weights that are divided by their sum over each
            sequence.
        denominator: what the sum is divided by."""

    response_weights: Tensor
    average: Literal["token", "sequence"] = "token"
    denominator: int = 1


@dataclass(frozen=True)
class LossHead:
    """The hidden states of one micro-batch, and the head's weight.

    Attributes:
        batch: the micro-batch of T tokens.
        hidden: (T, H), whose gradient Megatron sums over `tensor_group`.
        weight: (V_local, H), this rank's rows.
        temperature: the logits are divided by it.
        tensor_group: the tensor-parallel ranks.
        vocab_size: number of tokens; rows beyond are padding.
        context_group: the ranks that hold the other parts of the samples.
        main_grad: (V_local, H) fp32, to which the backward pass adds the weight's gradient; None:
            autograd gets it.
        stores_old_logprobs: whether `logprobs` stores its result as batch.logprobs["old"] where
            there is none: in the update of a policy, which starts at π_old (`policy_loss` always
            does)."""

    batch: PackedMicrobatch
    hidden: Tensor
    weight: Tensor
    temperature: float
    tensor_group: ProcessGroup
    vocab_size: int
    context_group: ProcessGroup | None = None
    main_grad: Tensor | None = None
    stores_old_logprobs: bool = False

    def logprobs(self) -> tuple[Tensor, Tensor]:
        """Compute log-probabilities and entropy of the response tokens, over what was kept.

        Returns:
            Each (T,) fp32 (fp64 for fp64), nats, 0 at other positions."""
        rows = self.batch.response_positions
        with trusted_values():  # `check_token_ids` has seen the targets
            logprobs, entropy = linear_token_logprobs(
                self.hidden[rows],
                self.weight,
                self.batch.targets[rows],
                sampling_mask=self._kept_at(rows),
                **self._kernel_options(),
            )
        zeros = logprobs.new_zeros(len(self.hidden))
        logprobs, entropy = (zeros.index_copy(0, rows, values) for values in (logprobs, entropy))
        if self.stores_old_logprobs:
            self.batch.logprobs.setdefault("old", logprobs.detach())
        return logprobs, entropy

    def policy_loss(
        self,
        settings: PolicySettings,
        token_averaging: TokenAveraging,
        ratio_level: RatioLevel = "token",
    ) -> LinearPolicyLoss:
        """Return the policy loss of the response tokens for `batch.advantages`.

        Uses batch.logprobs["old"] and, if there, ["ref"]. Without "old" the current policy is the
        old one (ratio 1), and its log-probabilities are stored as "old".

        Args:
            settings: those of a token's loss; with an `importance_cap` the difference between the
                engine's and the trainer's log-probabilities is corrected.
            token_averaging: what each token weighs.
            ratio_level: "sequence" for one ratio per response."""
        batch = self.batch
        tokens = TokenTensors(
            logprobs=None,
            old_logprobs=batch.logprobs.get("old"),
            ref_logprobs=batch.logprobs.get("ref"),
            rollout_logprobs=None if settings.importance_cap is None else batch.rollout_logprobs,
            advantages=batch.advantages,
            weights=token_averaging.response_weights,
        )
        averaging = Averaging(
            ratio_level=ratio_level,
            average=token_averaging.average,
            denominator=token_averaging.denominator,
            cu_seqlens=batch.cu_seqlens,
            sequence_group=self.context_group,
        )
        with trusted_values():  # and `pack_batch` makes cu_seqlens
            terms = linear_policy_loss_from_settings(
                self.hidden,
                self.weight,
                batch.targets,
                tokens,
                settings,
                averaging,
                rows=batch.response_positions,
                sampling_mask=batch.sampling_mask,
                **self._kernel_options(),
            )
        batch.logprobs.setdefault("old", terms.logprobs)
        return terms

    def _kept_at(self, rows: Tensor) -> SamplingMask | None:
        """Return the kept ids of all response tokens, `rows`."""
        if self.batch.sampling_mask is None:
            return None
        # Other tokens have no ids: those of one row end where those of the next begin.
        token_ids, offsets = self.batch.sampling_mask
        return SamplingMask(token_ids, torch.cat([offsets[rows], offsets[-1:]]))

    def _kernel_options(self) -> dict[str, Any]:
        return {
            "temperature": self.temperature,
            "group": self.tensor_group,
            "vocab_size": self.vocab_size,
            # The LMHead's gather or copy sums it over the group, in the backward pass.
            "reduce_hidden_grad": False,
            "main_grad": self.main_grad,
        }
