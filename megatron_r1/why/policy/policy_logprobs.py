"""Log-probabilities of a step's tokens by transformers, once and when they are asked for: under the
policy before the step, earlier ones and the reference, and under changed ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_r1.why.comparison import CannotRecompute
from megatron_r1.why.policy import (
    adapters,
    checkpoint_model,
    routed_experts,
    streamed_logprobs,
    token_logprobs,
)
from megatron_r1.why.policy.policy_models import PolicyModels, require_in_memory
from megatron_r1.why.policy.streamed_model import StreamedModel
from megatron_r1.why.policy.tensor_source import HEAD_NAME
from megatron_r1.why.policy.token_logprobs import TokenRow
from megatron_r1.why.record.recorded_step import RecordedStep, weights_after

LOGPROB_FLOPS = 1e13
"""Floating-point operations of a pass over logged tokens: minutes on two cores. Of more tokens a
part is computed."""


class PolicyLogprobs(PolicyModels):
    """Log-probabilities of a step's tokens under the policies that it used, and under others.

    Args:
        step: the step.
        memory: bytes that models may take; None: what is free.

    Raises:
        CannotRecompute: weights are missing, or too large for this machine.
    """

    def __init__(self, step: RecordedStep, memory: int | None = None) -> None:
        super().__init__(step, memory)
        self._logprobs_of_weights: dict[Path, list[np.ndarray]] = {}

    @property
    def temperature(self) -> float:
        """The step's sampling temperature."""
        return self.step.config.rollout.temperature

    @cached_property
    def scored_sequences(self) -> list[int]:
        """The sequences whose log-probabilities are computed: all, or every n-th where all would
        take too long."""
        stride = max(1, int(np.ceil(self.pass_flops / LOGPROB_FLOPS)))
        return list(range(0, len(self.rows), stride))

    @cached_property
    def old_logprobs(self) -> list[np.ndarray]:
        """Log-probabilities under the policy before the step, of `scored_sequences`, at the run's
        temperature."""
        return self.logprobs_under(self.policy)

    def packed_logprobs(
        self, microbatches: Sequence[Sequence[int]], *, restarts: bool
    ) -> list[np.ndarray] | None:
        """Return the log-probabilities with a micro-batch's rows as one sequence, in which each row
        attends to those before it; None where that changes nothing or one is too long.

        Args:
            microbatches: the rows of each micro-batch, in their order.
            restarts: whether positions begin anew with each row."""
        longest = max(
            (sum(len(self.rows[i].token_ids) for i in rows) for rows in microbatches), default=0
        )
        is_long = longest * self.step.hf_config["vocab_size"] > 4 * token_logprobs.LOGITS_AT_ONCE
        if is_long or not any(len(rows) > 1 for rows in microbatches):
            return None
        logprobs_by_row = list(self.old_logprobs)
        microbatch_rows = [[self.rows[index] for index in rows] for rows in microbatches]
        joined_rows = [join_rows(microbatch, restarts) for microbatch in microbatch_rows]
        # The layers of a streamed model are read once for all.
        passes = [joined_rows] if self.is_streamed else [[row] for row in joined_rows]
        logprobs_by_microbatch = [
            row_logprobs
            for rows in passes
            for row_logprobs in self._logprobs_of(rows, self.policy, self.temperature)
        ]
        for rows, microbatch, joined_logprobs in zip(
            microbatches, microbatch_rows, logprobs_by_microbatch, strict=True
        ):
            ends = np.cumsum([int(row.is_sampled.sum()) for row in microbatch])
            for index, part in zip(rows, np.split(joined_logprobs, ends[:-1]), strict=True):
                logprobs_by_row[index] = part
        return logprobs_by_row

    def logprobs_under(self, model: Any, temperature: float | None = None) -> list[np.ndarray]:
        """Return the log-probabilities of the tokens of `scored_sequences` under a model."""
        return self._logprobs_of(self._scored_rows, model, temperature or self.temperature)

    def _logprobs_of(
        self, rows: Sequence[TokenRow], model: Any, temperature: float
    ) -> list[np.ndarray]:
        (logprobs_by_row,) = logprobs_by_temperature(model, rows, [temperature])
        return [row_logprobs.numpy() for row_logprobs in logprobs_by_row]

    @property
    def _scored_rows(self) -> list[TokenRow]:
        return [self.rows[index] for index in self.scored_sequences]

    def logprobs_at_temperatures(self, temperatures: Sequence[float]) -> list[list[np.ndarray]]:
        """Return those under the policy before the step, by temperature."""
        by_temperature = logprobs_by_temperature(self.policy, self._scored_rows, temperatures)
        return [
            [row_logprobs.numpy() for row_logprobs in logprobs_by_row]
            for logprobs_by_row in by_temperature
        ]

    def logprobs_after(self, step: int) -> list[np.ndarray] | None:
        """Return those under the weights after another step; None where they are not kept."""
        path = weights_after(self.step.folder, self.step.run_config, step)
        if path is None:
            return None
        if path not in self._logprobs_of_weights:
            self._logprobs_of_weights[path] = self.logprobs_under(self.model(path))
        return self._logprobs_of_weights[path]

    def without_router_bias(self) -> list[np.ndarray] | None:
        """Return those under the policy before the step with routers that have no correction bias;
        None for a model without such a bias."""
        if self.is_streamed:
            return self._without_router_bias_streamed()
        names = [
            name for name in self.policy.state_dict() if name.endswith(routed_experts.ROUTER_BIAS)
        ]
        if not names:
            return None
        model = copy.deepcopy(self.policy)
        with torch.no_grad():
            for name in names:
                model.state_dict()[name].zero_()
        return self.logprobs_under(model)

    def with_adapter_scale(self, scale: float) -> list[np.ndarray] | None:
        """Return those under the policy before the step with adapters that are added with another
        scale; None for a model without adapters.

        Args:
            scale: in place of alpha / rank."""
        if self.is_streamed:
            source = self.policy.source
            if source.adapters is None:
                return None
            rescaled_source = source.with_adapters(source.adapters._replace(scale=scale))
            return self.logprobs_under(self.policy.with_source(rescaled_source))
        model = adapters.with_scale(self.policy, scale)
        return None if model is None else self.logprobs_under(model)

    def routing_agreement(self, shift: int = 0) -> float:
        """Return the share (0 to 1) of the engine's experts of sampled tokens that the policy
        before the step would choose itself.

        Args:
            shift: as of `rows_with_shifted_experts`; 0: each token's own.

        Raises:
            CannotRecompute: the log has no experts."""
        rows = rows_with_shifted_experts(self._scored_rows, shift) if shift else self._scored_rows
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
        return self._chosen_experts(rows_with_own_experts(self._scored_rows))

    def _chosen_experts(self, rows: Sequence[TokenRow]) -> dict[str, list[Tensor]]:
        if self.is_streamed:
            return streamed_logprobs.chosen_experts(self.policy, rows)
        return routed_experts.chosen_experts(self.policy, rows)

    def without_replay(self) -> list[np.ndarray] | None:
        """Return those under the policy before the step with the experts that it chooses itself;
        None where the engine's are not replayed."""
        if not self.step.config.rl.routing_replay:
            return None
        return self._logprobs_of(
            rows_with_own_experts(self._scored_rows), self.policy, self.temperature
        )

    def bfloat16_logprobs(self) -> list[np.ndarray]:
        """Return those under the policy before the step computed in bfloat16."""
        return self.logprobs_under(copy.deepcopy(require_in_memory(self.policy)).to(torch.bfloat16))

    def num_experts(self, layer: str) -> int:
        """Return how many experts a module of routed experts has."""
        model = self.policy.skeleton if self.is_streamed else self.policy
        return len(next(model.get_submodule(layer).parameters()))

    def with_experts(self, layer: str, sources: Mapping[int, int]) -> list[np.ndarray]:
        """Return those under the policy before the step with some experts' weights exchanged.

        Args:
            layer: the module of routed experts.
            sources: expert → the one whose weights it has."""
        model = copy.deepcopy(require_in_memory(self.policy))
        with torch.no_grad():
            for parameter in model.get_submodule(layer).parameters():
                values = parameter.detach().clone()
                for target, source in sources.items():
                    parameter[target] = values[source]
        return self.logprobs_under(model)

    def with_old_expert(self, layer: str, expert: int, step: int) -> list[np.ndarray] | None:
        """Return those under the policy before the step with one expert's weights after another
        step; None where they are not kept.

        Args:
            layer: the module of routed experts.
            expert: its number.
            step: the other step; 0: the model that the run began with."""
        path = weights_after(self.step.folder, self.step.run_config, step)
        if path is None:
            return None
        if self.is_streamed:
            old_source, beginning = self.tensors(path), f"{layer}.{expert}."
            return self._logprobs_with(
                {
                    name: partial(old_source.read, name)
                    for name in old_source.shapes
                    if name.startswith(beginning)
                }
            )
        old_weights = dict(
            require_in_memory(self.model(path)).get_submodule(layer).named_parameters()
        )
        model = copy.deepcopy(self.policy)
        with torch.no_grad():
            for name, parameter in model.get_submodule(layer).named_parameters():
                if name in old_weights:
                    parameter[expert] = old_weights[name][expert]
                elif parameter.requires_grad:  # a factor, which the model of step 0 has not
                    parameter[expert] = 0
        return self.logprobs_under(model)

    def with_head_apart(self) -> list[np.ndarray] | None:
        """Return those with the head that a tied model had when the run began; None for a model
        that is not tied."""
        begin = weights_after(self.step.folder, self.step.run_config, 0)
        has_adapters = self.step.run_config.model.lora is not None  # the head is frozen
        if begin is None or has_adapters or not self.step.hf_config.get("tie_word_embeddings"):
            return None
        if self.is_streamed:
            return self._logprobs_with({HEAD_NAME: partial(self.tensors(begin).read, HEAD_NAME)})
        model = copy.deepcopy(self.policy)
        head = require_in_memory(self.model(begin)).lm_head.weight.detach()
        model.lm_head.weight = torch.nn.Parameter(head)
        return self.logprobs_under(model)

    def _without_router_bias_streamed(self) -> list[np.ndarray] | None:
        shapes = self.policy.source.shapes
        names = [name for name in shapes if name.endswith(routed_experts.ROUTER_BIAS)]
        if not names:
            return None
        return self._logprobs_with({name: partial(torch.zeros, shapes[name]) for name in names})

    def _logprobs_with(self, values: Mapping[str, Callable[[], Tensor]]) -> list[np.ndarray]:
        """Return those under the streamed policy before the step with some other tensors.

        Args:
            values: functions that return the others, by published name."""
        source = self.policy.source.with_replacements(values)
        return self.logprobs_under(self.policy.with_source(source))

    def all_token_logprobs(self) -> list[np.ndarray]:
        """Return the log-probabilities of all tokens but the first, those of the prompt too."""
        rows = [
            replace(row, is_sampled=torch.arange(len(row.token_ids)) > 0, kept_ids=None)
            for row in self._scored_rows
        ]
        return self._logprobs_of(rows, self.policy, self.temperature)

    def plain_logprobs(self) -> list[np.ndarray]:
        """Return those under the policy before the step at temperature 1, over the whole
        vocabulary."""
        rows = [replace(row, kept_ids=None) for row in self._scored_rows]
        return self._logprobs_of(rows, self.policy, 1.0)

    def shifted_logprobs(self) -> list[np.ndarray]:
        """Return, in place of each sampled token's, the log-probability of the token before it."""
        rows = [replace(row, targets=row.token_ids.roll(1)) for row in self._scored_rows]
        return self._logprobs_of(rows, self.policy, self.temperature)

    def experts(self) -> dict[str, list[np.ndarray]]:
        """Return the experts that the policy before the step chooses for the tokens of
        `scored_sequences`, by layer: (tokens, experts per token) each."""
        by_layer = self._chosen_experts(self._scored_rows)
        return {
            name: [row_experts.numpy() for row_experts in experts_by_row]
            for name, experts_by_row in by_layer.items()
        }

    @cached_property
    def reference_logprobs(self) -> list[Tensor] | None:
        """Log-probabilities of all rows under the reference of the checkpoint; None without KL."""
        if not self.step.config.rl.kl_beta:
            return None
        if self.is_first_step and not self.step.config.rl.routing_replay:
            return self.all_old_logprobs
        rows, model = rows_with_own_experts(self.rows), self.reference_model
        return logprobs_by_temperature(model, rows, [self.temperature])[0]

    @property
    def reference_model(self) -> Any:
        """The reference of the checkpoint, in the first step the policy."""
        if self.is_first_step:
            return self.policy
        return self.model(self.checkpoint_before, checkpoint_model.REFERENCE_PREFIX)

    @cached_property
    def all_old_logprobs(self) -> list[Tensor]:
        """Log-probabilities of all rows under the policy before the step."""
        if len(self.scored_sequences) == len(self.rows):
            return [torch.from_numpy(row_logprobs) for row_logprobs in self.old_logprobs]
        return logprobs_by_temperature(self.policy, self.rows, [self.temperature])[0]

    @property
    def is_first_step(self) -> bool:
        """Whether the step is the run's first."""
        return self.step.step == 1


def logprobs_by_temperature(
    model: Any, rows: Sequence[TokenRow], temperatures: Sequence[float]
) -> list[list[Tensor]]:
    """Return what `token_logprobs.logprobs` returns, of a whole or of a streamed model."""
    if isinstance(model, StreamedModel):
        return streamed_logprobs.logprobs(model, rows, temperatures)
    return token_logprobs.logprobs(model, rows, temperatures)


def rows_with_shifted_experts(rows: Sequence[TokenRow], shift: int) -> list[TokenRow]:
    """Return rows with the engine's experts moved to other tokens; those of the tokens that get
    none are the router's choice.

    Args:
        rows: the sequences.
        shift: 1: to the token after; -1: to the token before."""
    shifted_rows = []
    for row in rows:
        experts = None
        if row.experts is not None:
            experts = torch.full_like(row.experts, -1)
            source, target = (slice(-1), slice(1, None))[::shift]
            experts[target] = row.experts[source]
        shifted_rows.append(replace(row, experts=experts))
    return shifted_rows


def join_rows(rows: Sequence[TokenRow], restarts: bool) -> TokenRow:
    """Return rows end to end as one.

    Args:
        rows: the rows.
        restarts: whether positions begin anew with each."""
    kept_ids = [row.kept_ids for row in rows if row.kept_ids is not None]
    experts = [row.experts for row in rows if row.experts is not None]
    token_ids = torch.cat([row.token_ids for row in rows])
    positions = [torch.arange(len(row.token_ids)) for row in rows]
    return replace(
        rows[0],
        token_ids=token_ids,
        is_sampled=torch.cat([row.is_sampled for row in rows]),
        kept_ids=(
            torch.cat([counts for counts, _ in kept_ids]),
            torch.cat([ids for _, ids in kept_ids]),
        )
        if kept_ids
        else None,
        experts=torch.cat(experts) if experts else None,
        positions=torch.cat(positions) if restarts else torch.arange(len(token_ids)),
    )


def rows_with_own_experts(rows: Sequence[TokenRow]) -> list[TokenRow]:
    """Return rows whose experts the model chooses, as the trainer's reference does."""
    return [replace(row, experts=None) for row in rows]
