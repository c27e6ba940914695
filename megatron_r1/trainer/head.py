"""The LM head as a loss sees it: log-probabilities, or a whole policy loss with its gradients.

Only response tokens pass through the head; prompts and padding cost nothing there."""

from dataclasses import dataclass
from typing import Any

import torch
from r1_kernels import LinearPolicyLoss, linear_policy_loss, linear_token_logprobs
from r1_kernels.arguments import trusted_values
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_r1.trainer.batch import PackedBatch


@dataclass(frozen=True)
class Head:
    """The hidden states of one micro-batch, and the head's weight.

    Attributes:
        batch: the micro-batch of T tokens.
        hidden: (T, H), whose gradient Megatron sums over `group`.
        weight: (V_local, H), this rank's rows.
        temperature: the logits are divided by it.
        group: the tensor-parallel ranks.
        vocab_size: number of tokens; rows beyond are padding.
        context_group: the ranks that hold the other parts of the samples."""

    batch: PackedBatch
    hidden: Tensor
    weight: Tensor
    temperature: float
    group: ProcessGroup
    vocab_size: int
    context_group: ProcessGroup | None = None
    records_old: bool = False
    """Whether `logprobs` stores its result as batch.logprobs["old"] where there is none: in the
    update of a policy, which starts at π_old (`policy_loss` always does)."""

    def logprobs(self) -> tuple[Tensor, Tensor]:
        """Compute log-probabilities and entropy of the response tokens.

        Returns:
            Each (T,) fp32, nats, 0 at other positions."""
        rows = self.batch.response_rows
        with trusted_values():  # `packed.check_token_ids` has seen the targets
            logprobs, entropy = linear_token_logprobs(
                self.hidden[rows], self.weight, self.batch.targets[rows], **self._options()
            )
        zeros = torch.zeros(len(self.hidden), device=self.hidden.device)
        logprobs, entropy = (zeros.index_copy(0, rows, values) for values in (logprobs, entropy))
        if self.records_old:
            self.batch.logprobs.setdefault("old", logprobs.detach())
        return logprobs, entropy

    def policy_loss(self, mask: Tensor, **settings) -> LinearPolicyLoss:
        """Return the policy loss of the response tokens for `batch.advantages`.

        Uses batch.logprobs["old"] and, if there, ["ref"]. Without "old" the current policy is the
        old one (ratio 1), and its log-probabilities are stored as "old". For mask, average and
        denominator see `losses.token_weights`.

        Args:
            mask: (T,), the response tokens or their weights.
            **settings: those of r1_kernels' policy_loss; with a context_group a denominator must be
                among them."""
        batch = self.batch
        with trusted_values():  # and `packed_batch` makes cu_seqlens
            terms = linear_policy_loss(
                self.hidden,
                self.weight,
                batch.targets,
                batch.logprobs.get("old"),
                batch.logprobs.get("ref"),
                batch.advantages,
                mask,
                cu_seqlens=batch.cu_seqlens,
                sequence_group=self.context_group,
                rows=batch.response_rows,
                **settings,
                **self._options(),
            )
        batch.logprobs.setdefault("old", terms.logprobs)
        return terms

    def _options(self) -> dict[str, Any]:
        return {
            "temperature": self.temperature,
            "group": self.group,
            "vocab_size": self.vocab_size,
            # The LMHead's gather or copy sums it over the group, in the backward pass.
            "reduce_hidden_grad": False,
        }
