"""What logged tokens get from a model whose layers are read one by one: log-probabilities and
experts, as `token_logprobs` and `routed_experts` have them of a whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron_r1.why.policy.layer_stream import StreamMemory
from megatron_r1.why.policy.routed_experts import add_chosen
from megatron_r1.why.policy.streamed_model import StreamedModel
from megatron_r1.why.policy.token_logprobs import TokenRow, token_logprobs_and_entropies


@torch.no_grad()
def logprobs(
    model: StreamedModel, rows: Sequence[TokenRow], temperatures: Sequence[float]
) -> list[list[Tensor]]:
    """Return the log-probability of every sampled token, float64, by temperature and row.

    Args:
        model: the model.
        rows: the sequences.
        temperatures: the logits are divided by each."""
    by_temperature: list[list[Tensor]] = [[torch.empty(0)] * len(rows) for _ in temperatures]
    for outputs in model.hidden_states(rows):
        head = model.head()
        for index, hidden in outputs.items():
            row_by_temperature = _row_logprobs(
                head, hidden, rows[index], temperatures, model.memory
            )
            for logprobs_by_row, row_logprobs in zip(
                by_temperature, row_by_temperature, strict=True
            ):
                logprobs_by_row[index] = row_logprobs
        del head  # its weights, before the next layer is read
    return by_temperature


def _row_logprobs(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    row: TokenRow,
    temperatures: Sequence[float],
    memory: StreamMemory,
) -> list[Tensor]:
    """Return a row's log-probabilities by temperature, float64.

    Args:
        head: the model's.
        hidden: outputs of the last layer, (sampled tokens, hidden size).
        row: the row.
        temperatures: the logits are divided by each.
        memory: how many logits are there at once."""
    pieces = [[torch.empty(0, dtype=torch.float64)] for _ in temperatures]
    for tokens, part in _parts(row, memory.logit_tokens):
        logits = head(hidden[tokens])
        for temperature_pieces, temperature in zip(pieces, temperatures, strict=True):
            temperature_pieces.append(token_logprobs_and_entropies(logits, part, temperature)[0])
    return [torch.cat(temperature_pieces) for temperature_pieces in pieces]


@torch.no_grad()
def chosen_experts(model: StreamedModel, rows: Sequence[TokenRow]) -> dict[str, list[Tensor]]:
    """Return what `routed_experts.chosen_experts` returns.

    Args:
        model: the model.
        rows: the sequences."""
    experts_by_layer: dict[str, list[Tensor]] = {}

    def note(indices: list[int], experts: Mapping[str, Tensor]) -> None:
        add_chosen(experts_by_layer, experts, rows, indices)

    for _ in model.hidden_states(rows, note):
        pass
    return experts_by_layer


def _parts(row: TokenRow, num_tokens: int) -> Iterator[tuple[slice, TokenRow]]:
    """Yield ranges of a row's sampled tokens, each with a copy of the row that samples these alone.

    Args:
        row: the sequence.
        num_tokens: the most tokens of a range."""
    places = row.is_sampled.nonzero()[:, 0]
    for start in range(0, len(places), num_tokens):
        tokens = slice(start, start + num_tokens)
        is_sampled = torch.zeros_like(row.is_sampled)
        is_sampled[places[tokens]] = True
        part = replace(row, is_sampled=is_sampled)
        if row.kept_ids is not None:
            counts, ids = row.kept_ids
            first, end = int(counts[:start].sum()), int(counts[: start + num_tokens].sum())
            part = replace(part, kept_ids=(counts[tokens], ids[first:end]))
        yield tokens, part
