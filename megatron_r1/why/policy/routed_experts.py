"""Notes the experts that a model of transformers routes tokens to, and moves the routers'
correction biases."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_r1.why.policy.token_logprobs import length_batches, token_logits
from megatron_r1.why.policy.token_rows import TokenRow

ROUTER_BIAS = "e_score_correction_bias"


@contextlib.contextmanager
def seen_experts(model: Any) -> Iterator[dict[str, Tensor]]:
    """Note in the block which experts each forward pass chooses.

    Yields the newest pass's by the name of the layer's experts, (tokens of the batch, experts per
    token) int64; padding is among the tokens."""
    experts_by_layer: dict[str, Tensor] = {}
    handles = []
    for name, module in model.named_modules():
        if name.endswith(".experts"):

            def note(
                module: Any, inputs: tuple[Any, ...], options: dict[str, Any], name: str = name
            ) -> None:
                for value in (*inputs, *options.values()):
                    if isinstance(value, Tensor) and value.dtype == torch.int64:
                        experts_by_layer[name] = value.detach()

            handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
    try:
        yield experts_by_layer
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def chosen_experts(model: Any, rows: Sequence[TokenRow]) -> dict[str, list[Tensor]]:
    """Return the experts that each row's sampled tokens were predicted by, by layer of routed
    experts. Each is (sampled tokens, experts per token) int64; a dense model has no layers."""
    experts_by_layer: dict[str, list[Tensor]] = {}
    with seen_experts(model) as pass_experts:
        for batch in length_batches(rows, model.config.vocab_size):
            pass_experts.clear()
            token_logits(model, [rows[index] for index in batch])
            add_chosen(experts_by_layer, pass_experts, rows, batch)
    return experts_by_layer


def add_chosen(
    experts_by_layer: dict[str, list[Tensor]],
    pass_experts: Mapping[str, Tensor],
    rows: Sequence[TokenRow],
    batch: Sequence[int],
) -> None:
    """Add the experts of a batch to those that `chosen_experts` returns.

    Args:
        experts_by_layer: what is returned.
        pass_experts: what `seen_experts` noted of the batch.
        rows: all rows.
        batch: the indices of those in the batch."""
    longest = max(len(rows[index].token_ids) for index in batch)
    for name, experts in pass_experts.items():
        by_row = experts.reshape(len(batch), longest, -1)
        layer_experts = experts_by_layer.setdefault(name, [torch.empty(0)] * len(rows))
        for i, index in enumerate(batch):
            row = rows[index]
            layer_experts[index] = by_row[i, : len(row.token_ids) - 1][row.is_sampled[1:]]


class RouterBiases:
    """The correction biases of a model's routers, which balance its experts (arXiv 2408.15664).
    After an update each moves by a rate, up where an expert had fewer of the update's tokens than
    the mean. Tokens of prompts count.

    Args:
        model: the model, whose biases are changed.
        rate: `model.expert_bias_update_rate`."""

    def __init__(self, model: Any, rate: float) -> None:
        self._model, self._rate = model, rate
        self._counts: dict[str, Tensor] = {}

    def count(self, pass_experts: Mapping[str, Tensor], rows: Sequence[TokenRow]) -> None:
        """Count the tokens of a forward pass.

        Args:
            pass_experts: what `seen_experts` noted of it.
            rows: the sequences of the pass, in order."""
        longest = max(len(row.token_ids) for row in rows)
        for name, experts in pass_experts.items():
            by_row = experts.reshape(len(rows), longest, -1)
            token_experts = torch.cat(
                [
                    row_experts[: len(row.token_ids)].flatten()
                    for row_experts, row in zip(by_row, rows, strict=True)
                ]
            )
            size = len(self._router_bias(name))
            counts = torch.bincount(token_experts, minlength=size)
            self._counts[name] = self._counts.get(name, torch.zeros_like(counts)) + counts

    @torch.no_grad()
    def update(self) -> None:
        """Move the biases, and begin to count anew."""
        for name, counts in self._counts.items():
            self._router_bias(name).add_(self._rate * (counts.double().mean() - counts).sign())
        self._counts.clear()

    def _router_bias(self, experts: str) -> Tensor:
        router = self._model.get_submodule(experts.removesuffix(".experts") + ".gate")
        return getattr(router, ROUTER_BIAS)
