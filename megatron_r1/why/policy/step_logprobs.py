"""Computes the log-probabilities of a step's tokens by transformers, once and when they are asked
for: under the policy before the step, earlier ones and the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_r1.why.comparison import CannotRecompute
from megatron_r1.why.policy import routed_experts, streamed_model, token_logprobs
from megatron_r1.why.policy.step_models import StepModels
from megatron_r1.why.policy.streamed_model import StreamedModel
from megatron_r1.why.policy.token_rows import (
    TokenRow,
    join_rows,
    rows_with_own_experts,
    rows_with_shifted_experts,
)
from megatron_r1.why.record.recorded_step import weights_after

LOGPROB_FLOPS = 1e13
"""Floating-point operations of a pass over logged tokens: minutes on two cores. Of more tokens a
part is computed."""


class StepLogprobs:
    """Log-probabilities of a step's tokens under the policies that it used, and under others.

    Args:
        models: the step's models.

    Attributes:
        step: what the run recorded of it.

    Raises:
        CannotRecompute: weights are missing, or too large for this machine.
    """

    def __init__(self, models: StepModels) -> None:
        self.models, self.step = models, models.step
        self._logprobs_of_weights: dict[Path, list[np.ndarray]] = {}

    @property
    def temperature(self) -> float:
        """The step's sampling temperature."""
        return self.step.config.rollout.temperature

    @cached_property
    def computed_sequences(self) -> list[int]:
        """The sequences whose log-probabilities are computed: all, or every n-th where all would
        take too long."""
        stride = max(1, int(np.ceil(self.models.pass_flops / LOGPROB_FLOPS)))
        return list(range(0, len(self.models.rows), stride))

    @cached_property
    def old_logprobs(self) -> list[np.ndarray]:
        """Log-probabilities under the policy before the step, of `computed_sequences`, at the run's
        temperature."""
        return self.logprobs_under(self.models.policy)

    def packed_logprobs(
        self, microbatches: Sequence[Sequence[int]], *, restarts: bool
    ) -> list[np.ndarray] | None:
        """Return the log-probabilities as if each micro-batch were one sequence, where a row
        attends to the rows before it.

        None where every micro-batch has one row, or the logits of one are too many.

        Args:
            microbatches: the rows of each micro-batch, in their order.
            restarts: whether positions begin anew with each row."""
        longest = max(
            (sum(len(self.models.rows[i].token_ids) for i in rows) for rows in microbatches),
            default=0,
        )
        is_long = longest * self.step.hf_config["vocab_size"] > 4 * token_logprobs.LOGITS_AT_ONCE
        if is_long or not any(len(rows) > 1 for rows in microbatches):
            return None
        logprobs_by_row = list(self.old_logprobs)
        microbatch_rows = [[self.models.rows[index] for index in rows] for rows in microbatches]
        joined_rows = [join_rows(microbatch, restarts) for microbatch in microbatch_rows]
        # The layers of a streamed model are read once for all.
        passes = [joined_rows] if self.models.is_streamed else [[row] for row in joined_rows]
        logprobs_by_microbatch = [
            row_logprobs
            for rows in passes
            for row_logprobs in self._logprobs_of(rows, self.models.policy, self.temperature)
        ]
        for rows, microbatch, joined_logprobs in zip(
            microbatches, microbatch_rows, logprobs_by_microbatch, strict=True
        ):
            ends = np.cumsum([int(row.is_sampled.sum()) for row in microbatch])
            for index, part in zip(rows, np.split(joined_logprobs, ends[:-1]), strict=True):
                logprobs_by_row[index] = part
        return logprobs_by_row

    def logprobs_under(self, model: Any, temperature: float | None = None) -> list[np.ndarray]:
        """Return the log-probabilities of the tokens of `computed_sequences` under a model."""
        return self._logprobs_of(self._computed_rows, model, temperature or self.temperature)

    def _logprobs_of(
        self, rows: Sequence[TokenRow], model: Any, temperature: float
    ) -> list[np.ndarray]:
        (logprobs_by_row,) = logprobs_by_temperature(model, rows, [temperature])
        return [row_logprobs.numpy() for row_logprobs in logprobs_by_row]

    @property
    def _computed_rows(self) -> list[TokenRow]:
        return [self.models.rows[index] for index in self.computed_sequences]

    def logprobs_at_temperatures(self, temperatures: Sequence[float]) -> list[list[np.ndarray]]:
        """Return log-probabilities under the step's policy, by temperature."""
        by_temperature = logprobs_by_temperature(
            self.models.policy, self._computed_rows, temperatures
        )
        return [
            [row_logprobs.numpy() for row_logprobs in logprobs_by_row]
            for logprobs_by_row in by_temperature
        ]

    def logprobs_after(self, step: int) -> list[np.ndarray] | None:
        """Return log-probabilities under the weights after another step; None without them."""
        path = weights_after(self.step.folder, self.step.run_config, step)
        if path is None:
            return None
        if path not in self._logprobs_of_weights:
            self._logprobs_of_weights[path] = self.logprobs_under(self.models.model(path))
        return self._logprobs_of_weights[path]

    def routing_agreement(self, shift: int = 0) -> float:
        """Return the share (0 to 1) of the engine's experts of sampled tokens that the policy
        before the step would choose itself.

        Args:
            shift: as of `rows_with_shifted_experts`; 0: each token's own.

        Raises:
            CannotRecompute: the log has no experts."""
        rows = (
            rows_with_shifted_experts(self._computed_rows, shift) if shift else self._computed_rows
        )
        num_same = num_compared = 0
        for index, row in enumerate(rows):
            if row.experts is None:
                raise CannotRecompute("the sample log has no experts")
            recorded = row.experts[: len(row.token_ids) - 1][row.is_sampled[1:]]
            for layer, router_experts in enumerate(self._experts_without_replay.values()):
                layer_experts = recorded[:, layer].long()
                is_same = (layer_experts[:, :, None] == router_experts[index][:, None, :]).any(-1)
                num_same += int(is_same.sum())
                num_compared += int((layer_experts >= 0).sum())
        return num_same / num_compared if num_compared else 1.0

    @cached_property
    def _experts_without_replay(self) -> dict[str, list[Tensor]]:
        return self._chosen_experts(rows_with_own_experts(self._computed_rows))

    def _chosen_experts(self, rows: Sequence[TokenRow]) -> dict[str, list[Tensor]]:
        if self.models.is_streamed:
            return streamed_model.chosen_experts(self.models.policy, rows)
        return routed_experts.chosen_experts(self.models.policy, rows)

    def without_replay(self) -> list[np.ndarray] | None:
        """Return log-probabilities under the step's policy with the experts that it chooses itself;
        None where the engine's are not replayed."""
        if not self.step.config.rl.routing_replay:
            return None
        return self._logprobs_of(
            rows_with_own_experts(self._computed_rows), self.models.policy, self.temperature
        )

    def all_token_logprobs(self) -> list[np.ndarray]:
        """Return the log-probabilities of all tokens but the first, those of the prompt too."""
        rows = [
            replace(row, is_sampled=torch.arange(len(row.token_ids)) > 0, kept_ids=None)
            for row in self._computed_rows
        ]
        return self._logprobs_of(rows, self.models.policy, self.temperature)

    def plain_logprobs(self) -> list[np.ndarray]:
        """Return log-probabilities under the step's policy at temperature 1, over the whole
        vocabulary."""
        rows = [replace(row, kept_ids=None) for row in self._computed_rows]
        return self._logprobs_of(rows, self.models.policy, 1.0)

    def shifted_logprobs(self) -> list[np.ndarray]:
        """Return, in place of each sampled token's, the log-probability of the token before it."""
        rows = [replace(row, targets=row.token_ids.roll(1)) for row in self._computed_rows]
        return self._logprobs_of(rows, self.models.policy, self.temperature)

    def experts(self) -> dict[str, list[np.ndarray]]:
        """Return the experts that the policy before the step chooses for the tokens of
        `computed_sequences`, by layer: (tokens, experts per token) each."""
        by_layer = self._chosen_experts(self._computed_rows)
        return {
            name: [row_experts.numpy() for row_experts in experts_by_row]
            for name, experts_by_row in by_layer.items()
        }

    @cached_property
    def ref_logprobs(self) -> list[Tensor] | None:
        """Log-probabilities of all rows under the reference of the checkpoint; None without KL."""
        if not self.step.config.rl.kl_beta:
            return None
        if self.models.is_first_step and not self.step.config.rl.routing_replay:
            return self.all_old_logprobs
        rows, model = rows_with_own_experts(self.models.rows), self.models.reference_model
        return logprobs_by_temperature(model, rows, [self.temperature])[0]

    @cached_property
    def all_old_logprobs(self) -> list[Tensor]:
        """Log-probabilities of all rows under the policy before the step."""
        if len(self.computed_sequences) == len(self.models.rows):
            return [torch.from_numpy(row_logprobs) for row_logprobs in self.old_logprobs]
        return logprobs_by_temperature(self.models.policy, self.models.rows, [self.temperature])[0]


def logprobs_by_temperature(
    model: Any, rows: Sequence[TokenRow], temperatures: Sequence[float]
) -> list[list[Tensor]]:
    """Return what `token_logprobs.sampled_logprobs` returns.

    Args:
        model: a whole model, or a streamed one.
        rows: prompts with responses.
        temperatures: those of each result."""
    if isinstance(model, StreamedModel):
        return streamed_model.sampled_logprobs(model, rows, temperatures)
    return token_logprobs.sampled_logprobs(model, rows, temperatures)
