"""A language model: Megatron's GPTModel, whose last stage returns hidden states instead of logits.

The trainer's loss takes hidden states and the vocabulary-parallel head weight and never holds
tokens x vocabulary logits. LMHead keeps the communication that Megatron's output layer does on its
*input*, so each rank can compute with its part of the vocabulary alone and the gradients of the
hidden states are still summed over ranks.

Shapes: s tokens, b batches (1 for a packed batch), h hidden size. Inside the model tensors have
Megatron's order (s, b, h); what the last stage returns is (b, s, h)."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.inference.contexts import BaseInferenceContext
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.multi_token_prediction import (
    MTPLossAutoScaler,
    roll_tensor,
)
from megatron.core.utils import unwrap_model
from r1_kernels import linear_token_logprobs
from r1_kernels.arguments import trusted_values
from torch import Tensor
from torch.nn import Module

from megatron_r1.models.expert_exchange_overlap import SchedulableModel
from megatron_r1.models.gradients import fp32_main_grad


class LMHead(ColumnParallelLinear):
    """Megatron's output layer without its product: holds the weight, returns the hidden states.

    It is still called in the forward pass, because Megatron's overlapped parameter gathering waits
    for a module's parameters in that module's forward hook."""

    @classmethod
    def replacing(cls, layer: ColumnParallelLinear, config: TransformerConfig) -> LMHead:
        """Return an LMHead with the weight, attributes included, of GPTModel's output layer."""
        head = cls(
            layer.input_size,
            layer.output_size,
            config=config,
            init_method=config.init_method,
            bias=False,
            skip_weight_param_allocation=True,
            tp_group=layer.tp_group,
        )
        head.weight = layer.weight
        return head

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> tuple[Tensor, None]:
        """Gather the input of the output layer.

        Over the tensor-parallel group: each rank's gradient comes from its part of the vocabulary,
        so the backward pass sums them (all-reduce, or reduce-scatter under sequence parallelism).

        Args:
            input_: (s, b, h), under sequence parallelism this rank's part of s.
            weight: not used; an argument of Megatron's output layers.
            runtime_gather_output: not used; Megatron passes it to every output layer.

        Returns:
            (s, b, h) whole, and no bias."""
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(
                input_, tensor_parallel_output_grad=True, group=self.tp_group
            ), None
        return copy_to_tensor_model_parallel_region(input_, group=self.tp_group), None


class PolicyModel(SchedulableModel):
    """GPTModel that returns hidden states (b, s, h), after the final norm, from its last stage.

    With `labels` (b, s), where labels[i] follows input_ids[i], and `loss_mask` (b, s), the backward
    pass of the output also contains the MTP layers' loss (scaled as in Megatron:
    mtp_loss_scaling_factor and the token count); the hidden states themselves are the same. Without
    labels MTP layers are not run. Where they are on an earlier stage than the head, that stage
    sends their hidden states behind its own, and the last stage computes the loss."""

    mtp_only_divisor: int | None = None
    """None: the MTP losses train the whole model (SFT). A number: they train the MTP layers only,
    to which hidden states, embedding and head are constants, and are divided by it, the most tokens
    of a response: as sums over tokens next to a policy loss per sequence they would dominate the
    gradient norm that is clipped."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # Rows of the embedding and head beyond this are padding, never a token.
        self.unpadded_vocab_size = self.vocab_size
        if self.post_process:
            # Replaced, not built anew: Megatron has tied and marked the weight already.
            self.output_layer: LMHead = LMHead.replacing(self.output_layer, self.config)

    def _postprocess(
        self,
        hidden_states: Tensor,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        mtp_in_postprocess: bool | None = None,
        runtime_gather_output: bool | None = None,
        decoder_input: Tensor | None = None,
        inference_context: BaseInferenceContext | None = None,
        extra_block_kwargs: dict[str, Any] | None = None,
        output_processor: None = None,
        output_processor_context: None = None,
        **context: Any,
    ) -> Tensor:
        """Return hidden states in place of Megatron's logits: (s, b, h) before the last stage,
        (b, s, h) on it. With labels their gradient contains the MTP loss."""
        runs_mtp = labels is not None and self.config.mtp_num_layers
        if runs_mtp and mtp_in_postprocess:
            arguments = context | (extra_block_kwargs or {})
            hidden_states = self._with_predictions(hidden_states, arguments)
        if not self.post_process:
            return hidden_states
        if runs_mtp:
            assert labels is not None, "MTP layers predict labels"
            hidden_states, *predicted_states = hidden_states.chunk(1 + self.config.mtp_num_layers)
            hidden_states = self._with_mtp_loss(
                hidden_states, predicted_states, labels, loss_mask, context["packed_seq_params"]
            )
        hidden_states, _ = self.output_layer(hidden_states, weight=lm_head_weight(self))
        return hidden_states.transpose(0, 1).contiguous()

    def _with_predictions(self, hidden_states: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Return hidden states with those of the MTP layers behind them."""
        if self.mtp_only_divisor is None:
            return self.mtp(hidden_states=hidden_states, embedding=self.embedding, **arguments)
        # Needs a gradient: a recomputed layer whose inputs need none would get none itself.
        constant_states = hidden_states.detach().requires_grad_()
        states = self.mtp(
            hidden_states=constant_states, embedding=self._constant_embedding, **arguments
        )
        predicted_states = states[len(hidden_states) :]
        return torch.cat([hidden_states, predicted_states])

    def _constant_embedding(self, **tokens: Tensor) -> Tensor:
        return self.embedding(**tokens).detach()

    def _with_mtp_loss(
        self,
        hidden: Tensor,
        predicted: Sequence[Tensor],
        labels: Tensor,
        loss_mask: Tensor | None,
        packed_seq_params: PackedSeqParams | None,
    ) -> Tensor:
        """Return `hidden` (s, b, h) with the gradient of the MTP losses in its backward pass.

        Args:
            hidden: (s, b, h), the hidden states of the last decoder layer.
            predicted: of MTP layer k (s, b, h), whose targets are the labels shifted by k + 1.
            labels: (b, s).
            loss_mask: (b, s).
            packed_seq_params: the borders of the packed sequences.
        """
        mask = torch.ones_like(labels, dtype=torch.float32) if loss_mask is None else loss_mask
        scale = self.config.mtp_loss_scaling_factor / self.config.mtp_num_layers
        roll = {"shifts": -1, "dims": -1, "cp_group": self.cp_group}
        rows_of_layers = getattr(packed_seq_params, "mtp_target_rows", ())
        for layer, states in enumerate(predicted):
            labels, _ = roll_tensor(labels, packed_seq_params=packed_seq_params, **roll)
            mask, num_tokens = roll_tensor(mask, packed_seq_params=packed_seq_params, **roll)
            rows = rows_of_layers[layer] if rows_of_layers else None
            losses = mask * self._cross_entropy(states, labels, mask, rows)
            # With per-token losses the schedule divides by the number of tokens of the whole step.
            divisor = 1 if self.config.calculate_per_token_loss else num_tokens.clamp(min=1)
            divisor *= self.mtp_only_divisor or 1
            hidden = MTPLossAutoScaler.apply(hidden, scale * losses / divisor)
        return hidden

    def _cross_entropy(
        self, states: Tensor, labels: Tensor, mask: Tensor, rows: Tensor | None
    ) -> Tensor:
        """Return -log p(label), (b, s) fp32, where the mask is not 0.

        Args:
            states: (s, b, h), the hidden states.
            labels: (b, s), the tokens.
            mask: (b, s).
            rows: where the mask is not 0, in (b s,), int64, of labels that are known to be tokens
                of the model; None: not known, and the host waits for the device to find and check
                them."""
        hidden, _ = self.output_layer(states)
        hidden = hidden.transpose(0, 1).reshape(-1, hidden.shape[-1])
        trust = contextlib.nullcontext() if rows is None else trusted_values()
        if rows is None:
            rows = mask.reshape(-1).nonzero()[:, 0]
        weight = lm_head_weight(self)
        with trust:
            logprobs, _ = linear_token_logprobs(
                hidden[rows],
                weight if self.mtp_only_divisor is None else weight.detach(),
                labels.reshape(-1)[rows],
                group=self.output_layer.tp_group,
                vocab_size=self.unpadded_vocab_size,
                reduce_hidden_grad=False,
                main_grad=fp32_main_grad(weight) if self.mtp_only_divisor is None else None,
            )
        losses = logprobs.new_zeros(labels.numel()).index_copy(0, rows, -logprobs)
        return losses.view_as(labels)


def freeze_mtp(model: PolicyModel) -> None:
    """Exclude the MTP layers from training; call before wrapping in DistributedDataParallel.

    For RL, which has no labels for them: weight decay would still shrink parameters without
    gradients."""
    model = unwrap_model(model)
    if getattr(model, "mtp", None) is not None:
        model.mtp.requires_grad_(False)


def lm_head_weight(model: Module) -> Tensor:
    """Return this rank's rows of the head, (padded vocabulary / tensor_parallel, h), tied or not.

    Rows outside `vocab_shard` are padding.

    Args:
        model: a last pipeline stage, bare or wrapped."""
    stage: GPTModel = unwrap_model(model)
    weight = stage.output_layer.weight
    return stage.shared_embedding_or_output_weight() if weight is None else weight


def vocab_shard(model: Module) -> range:
    """Return the tokens whose head rows this rank holds: row i of `lm_head_weight` is token
    vocab_shard[i].

    Shorter than the weight where the vocabulary is padded to a multiple of the tensor-parallel
    size; a softmax must leave those last rows out (logits -inf, or the weight cut)."""
    stage: PolicyModel = unwrap_model(model)
    num_rows = stage.output_layer.output_size_per_partition
    start = num_rows * stage.output_layer.tp_group.rank()
    end = start + num_rows
    return range(min(start, stage.unpadded_vocab_size), min(end, stage.unpadded_vocab_size))


def compute_logits(model: Module, hidden: Tensor) -> Tensor:
    """Return the logits (b, s, this rank's vocabulary) of `hidden` (b, s, h), the last stage's.

    Logits of padding rows are -inf. For tools and tests: the training loss never forms them."""
    out = hidden @ lm_head_weight(model).t()
    padding = torch.arange(out.shape[-1], device=out.device) >= len(vocab_shard(model))
    return out.masked_fill(padding, float("-inf"))
