"""Keeps what all recomputations of a step have in common: the pass of its first update.

Its weights are those before the step for every candidate cause in loss or optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatron_r1.why.policy.routed_experts import seen_experts
from megatron_r1.why.policy.token_logprobs import LOGITS_AT_ONCE, length_batches, token_logits
from megatron_r1.why.policy.token_rows import TokenRow
from megatron_r1.why.policy.transformers_adapters import trained_parameters
from megatron_r1.why.update.adam import Moments
from megatron_r1.why.update.loss_formulas import Update

MAX_PARAMETERS, MAX_LOGITS = 2**25, LOGITS_AT_ONCE // 4
"""The largest model whose graph is kept, and the most logits: about a gigabyte."""


@dataclass(frozen=True)
class ModelPass:
    """A forward pass of a batch.

    Attributes:
        logits: those that predict the sampled tokens of each row, (sampled tokens, vocabulary)
            float32.
        experts: what `seen_experts` noted of it."""

    logits: list[Tensor]
    experts: dict[str, Tensor]


def model_pass(model: Any, rows: Sequence[TokenRow]) -> ModelPass:
    """Return a forward pass of a model on rows.

    Args:
        model: transformers' model.
        rows: the batch."""
    with seen_experts(model) as experts:
        return ModelPass(token_logits(model, rows), experts)


@dataclass(frozen=True)
class KnownGradients:
    """What the first update as the settings say computed.

    Attributes:
        update: what it measures.
        tokens: log-probability and entropy of each sampled token, float64, by row.
        gradients: the gradient of each parameter, before clipping.
        by_term: that of each term of the loss, by its name; empty where these were not computed."""

    update: Update
    tokens: dict[int, tuple[Tensor, Tensor]]
    gradients: Moments
    by_term: Mapping[str, Moments]


class FirstUpdate:
    """The forward passes of the first update, whose graph is kept, and its gradients.

    Args:
        model: the policy before the step, whose parameters must not change.
        rows: the rows of the first mini-batch that are trained on, by number.

    Attributes:
        parameters: those of the model that have gradients, by name.
        known_gradients: the update as the settings say; None before it is made."""

    def __init__(self, model: Any, rows: Mapping[int, TokenRow]) -> None:
        self.parameters = trained_parameters(model)
        self.known_gradients: KnownGradients | None = None
        self._model, self._rows = model, dict(rows)
        self._passes: dict[tuple[int, ...], ModelPass] = {}

    def has_inputs(self, rows: Mapping[int, TokenRow]) -> bool:
        """Return whether the kept passes serve for these rows, so that none is made anew.

        They do where the rows have the same numbers, in the same order, and what a model reads of
        them is the same tensors. Advantages may differ, which only the loss reads.

        Args:
            rows: those that another recomputation trains on in its first update, by number."""
        return list(rows) == list(self._rows) and all(
            _input_identities(row) == _input_identities(self._rows[index])
            for index, row in rows.items()
        )

    def batch_pass(self, rows: Mapping[int, TokenRow]) -> ModelPass:
        """Return the forward pass of a batch, which is made once.

        Args:
            rows: its rows, by number; of the first update, or left out of its loss."""
        key = tuple(rows)
        if key not in self._passes:
            self._passes[key] = model_pass(self._model, list(rows.values()))
        return self._passes[key]


def _input_identities(row: TokenRow) -> tuple[int, ...]:
    """Return the identities of the tensors on which a model's logits of a row depend; a copy of one
    counts as another."""
    return tuple(map(id, (row.token_ids, row.is_sampled, row.positions, row.experts)))


def first_update(
    model: Any, rows: Sequence[TokenRow], minibatch: Sequence[int], num_parameters: int
) -> FirstUpdate | None:
    """Return the first update of a step; None where its graph is large.

    Args:
        model: the policy before the step.
        rows: the rows of the step.
        minibatch: the rows of its first mini-batch.
        num_parameters: the size of the model."""
    rows_by_index = {index: rows[index] for index in minibatch if rows[index].is_trained}
    vocabulary = model.config.vocab_size
    trained_rows = list(rows_by_index.values())
    num_tokens = sum(  # of each batch the first row is the longest
        len(batch) * len(trained_rows[batch[0]].token_ids)
        for batch in length_batches(trained_rows, vocabulary)
    )
    if num_parameters > MAX_PARAMETERS or num_tokens * vocabulary > MAX_LOGITS:
        return None
    return FirstUpdate(model, rows_by_index)
