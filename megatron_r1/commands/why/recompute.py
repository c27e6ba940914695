"""What transformers computes of a step, once and when it is asked for: log-probabilities under the
policy before the step, the one before that, and the reference; and the step's updates, as the
settings say or with one thing substituted."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from megatron_r1.commands.why import formulas, replay
from megatron_r1.commands.why.finding import CannotRecompute
from megatron_r1.commands.why.recorded import RecordedStep, TokenSequence, weights_after
from megatron_r1.commands.why.replay import AdamRules, LossRules, Row, StepReplay, Update
from megatron_r1.commands.why.substitutions import Substitution
from megatron_r1.models.sampling_mask import decode_mask

LOGPROB_FLOPS, UPDATE_FLOPS = 1e13, 2e13
"""Floating-point operations of a pass over logged tokens, and of a step's updates: minutes on two
cores. Of more tokens a part is computed; more updates are not made."""
COPIES = 7
"""Copies of the parameters, fp32, that the updates need: model, gradients, moments, and others."""


@dataclass(frozen=True)
class Replayed:
    """The updates of a step, made again.

    Attributes:
        metrics: as metrics.jsonl has them, over the updates.
        terms: the part of the loss that each term has, mean over the updates.
        update: |own - run's| / |run's change| of all parameters; None without a checkpoint after.
        by_parameter: by name, the same of each, largest first."""

    metrics: dict[str, float]
    terms: dict[str, float]
    update: float | None
    by_parameter: list[tuple[str, float]]


class Recomputation:
    """Recomputes a recorded step: log-probabilities under the policies that it used, and updates.

    Raises:
        CannotRecompute: weights are missing, or too large for this machine.
    """

    def __init__(self, step: RecordedStep) -> None:
        self.step = step
        self.sequences = step.sequences
        is_cut = step.config.rollout.truncates_sampling
        self.rows = [_row(sequence, is_cut) for sequence in self.sequences]
        self._known: dict[Path, list[np.ndarray]] = {}

    @property
    def temperature(self) -> float:
        """The step's sampling temperature."""
        return self.step.config.rollout.temperature

    @cached_property
    def with_logprobs(self) -> list[int]:
        """The sequences whose log-probabilities are computed: all, or every n-th where all would
        take too long."""
        cost = 2.0 * self.num_parameters * sum(len(row.token_ids) for row in self.rows)
        stride = max(1, int(np.ceil(cost / LOGPROB_FLOPS)))
        return list(range(0, len(self.rows), stride))

    @cached_property
    def num_parameters(self) -> int:
        """How many values the policy's weights have, on which the operations of a pass depend."""
        from megatron_r1.models.weights import num_parameters

        return num_parameters(self.step.hf)

    @cached_property
    def policy(self) -> Any:
        """The model before the step."""
        return self.model(self._before)

    @property
    def _before(self) -> Path:
        before = self.step.before
        if before is None:
            raise CannotRecompute(
                f"there is no checkpoint of step {self.step.step - 1}: keep them with "
                "checkpoint.keep_every: 1, or a larger N"
            )
        return before

    def model(self, source: Path, prefix: str = "") -> Any:
        """Return the model in a checkpoint or folder."""
        if self.step.run_config.model.lora is not None:
            raise CannotRecompute("model.lora: checkpoints hold adapters alone")
        longest = max((len(row.token_ids) for row in self.rows), default=0)
        logits = max(replay.LOGITS_AT_ONCE, longest * self.step.hf["vocab_size"])
        needed = 6 * self.num_parameters + replay.BYTES_PER_LOGIT * logits
        free = psutil.virtual_memory().available
        if needed > free:
            raise CannotRecompute(
                f"the model and the logits of its longest response need {needed / 1e9:.0f} GB, "
                f"{free / 1e9:.0f} GB are free"
            )
        return replay.read_model(source, self.step.model, prefix)

    @cached_property
    def old(self) -> list[np.ndarray]:
        """Log-probabilities under the policy before the step, of `with_logprobs`, at the run's
        temperature."""
        return self.under(self.policy)

    def under(self, model: Any, temperature: float | None = None) -> list[np.ndarray]:
        """Return the log-probabilities of the tokens of `with_logprobs` under a model."""
        rows = [self.rows[at] for at in self.with_logprobs]
        (found,) = replay.logprobs(model, rows, [temperature or self.temperature])
        return [each.numpy() for each in found]

    def at_temperatures(self, temperatures: Sequence[float]) -> list[list[np.ndarray]]:
        """Return those under the policy before the step, by temperature."""
        rows = [self.rows[at] for at in self.with_logprobs]
        found = replay.logprobs(self.policy, rows, temperatures)
        return [[each.numpy() for each in one] for one in found]

    def after(self, step: int) -> list[np.ndarray] | None:
        """Return those under the weights after another step; None where they are not kept."""
        path = weights_after(self.step.folder, self.step.run_config, step)
        if path is None:
            return None
        if path not in self._known:
            self._known[path] = self.under(self.model(path))
        return self._known[path]

    def without_router_bias(self) -> list[np.ndarray] | None:
        """Return those under the policy before the step with routers that have no correction bias;
        None for a model without such a bias."""
        names = [name for name in self.policy.state_dict() if name.endswith(replay.ROUTER_BIAS)]
        if not names:
            return None
        other = copy.deepcopy(self.policy)
        with torch.no_grad():
            for name in names:
                other.state_dict()[name].zero_()
        return self.under(other)

    def experts(self) -> dict[str, list[np.ndarray]]:
        """Return the experts that the policy before the step chooses for the tokens of
        `with_logprobs`, by layer: (tokens, experts per token) each."""
        rows = [self.rows[at] for at in self.with_logprobs]
        found = replay.chosen_experts(self.policy, rows)
        return {name: [each.numpy() for each in one] for name, one in found.items()}

    @cached_property
    def reference(self) -> list[Tensor] | None:
        """Log-probabilities of all rows under the reference of the checkpoint; None without KL."""
        if not self.step.config.rl.kl_beta:
            return None
        if self._is_begin:
            return self._old_of_all
        return replay.logprobs(
            self.model(self._before, replay.REFERENCE), self.rows, [self.temperature]
        )[0]

    @cached_property
    def _old_of_all(self) -> list[Tensor]:
        if len(self.with_logprobs) == len(self.rows):
            return [torch.from_numpy(each) for each in self.old]
        return replay.logprobs(self.policy, self.rows, [self.temperature])[0]

    @property
    def _is_begin(self) -> bool:
        """Whether the step is the run's first."""
        return self.step.step == 1

    @cached_property
    def _moments(self) -> tuple[Any, Any] | None:
        if self._is_begin:
            return None
        names = (f"{replay.STATE}{name}." for name in replay.MOMENTS)
        first, second = (self.model(self._before, name) for name in names)
        return first, second

    @cached_property
    def num_updates(self) -> int:
        """Updates before the step, as the checkpoint's optimizer has counted them."""
        return 0 if self._is_begin else replay.read_state(self._before) or 0

    def check_updates(self) -> None:
        """Raise CannotRecompute where the step's updates cannot be made here."""
        config = self.step.config
        before, mask = self._before, config.rl.engine_mask
        algorithm, bias_rate = config.rl.algorithm, config.model.expert_bias_update_rate
        reasons = (
            (
                algorithm not in formulas.ALGORITHMS,
                f"rl.algorithm: {algorithm} is none of {', '.join(sorted(formulas.ALGORITHMS))}",
            ),
            (config.rl.routing_replay, "rl.routing_replay: experts are the engine's"),
            (
                config.rl.reward_normalization != "sum",
                "rl.reward_normalization: each makes advantages of each reward",
            ),
            (
                bool(config.rl.kl_beta) and config.rl.kl_estimator == "unbiased",
                "rl.kl_estimator: unbiased, which is not recomputed",
            ),
            (mask != "none", f"rl.engine_mask: {mask} leaves out some tokens"),
            (config.model.mtp == "train", "model.mtp: train adds a loss of its own"),
            (bias_rate > 0, "model.expert_bias_update_rate changes the router between updates"),
            (config.fp8.recipe != "none", f"fp8.recipe: {config.fp8.recipe}"),
        )
        for applies, reason in reasons:
            if applies:
                raise CannotRecompute(reason)
        cost = 8.0 * self.num_parameters * sum(len(row.token_ids) for row in self.rows)
        if cost > UPDATE_FLOPS:
            raise CannotRecompute(
                f"the updates take {cost / 1e12:,.0f} teraflops here, at most "
                f"{UPDATE_FLOPS / 1e12:.0f} are spent"
            )
        needed = 4 * COPIES * self.num_parameters
        free = psutil.virtual_memory().available
        if needed > free:
            raise CannotRecompute(
                f"the updates need {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"
            )
        if config.rl.kl_beta and not self._is_begin and not replay.has_part(before, "reference."):
            raise CannotRecompute(f"{before} has no reference policy")

    def minibatches(self) -> list[list[int]]:
        """Return the rows of each mini-batch: responses in an order of the run's seed and step,
        those that are trained on spread evenly."""
        by_response: dict[Any, list[int]] = {}
        for at, sequence in enumerate(self.sequences):
            by_response.setdefault(sequence.place, []).append(at)
        shuffled = list(by_response.values())
        random.Random(f"{self.step.run_config.run.seed}:{self.step.step}").shuffle(shuffled)
        trained = [rows for rows in shuffled if self.rows[rows[0]].is_trained]
        count = self.step.config.rl.minibatches
        return [
            [
                at
                for rows in trained[i * len(trained) // count : (i + 1) * len(trained) // count]
                for at in rows
            ]
            for i in range(count)
        ]

    def loss_rules(self) -> LossRules:
        """Return the loss of the step's settings."""
        rl, limit = self.step.config.rl, self.step.config.rollout.max_response_tokens
        return LossRules(
            average=rl.loss_average,
            constant=limit,
            clip_low=rl.clip_low,
            clip_high=rl.clip_high,
            dual_clip=rl.dual_clip,
            is_sequence_ratio=rl.ratio_level == "sequence",
            is_cispo=rl.algorithm == "cispo",
            importance_cap=rl.importance_cap,
            kl_beta=rl.kl_beta,
            kl_estimator=rl.kl_estimator,
            entropy_coef=rl.entropy_coef,
            temperature=self.temperature,
        )

    def adam_rules(self) -> AdamRules:
        """Return the optimizer of the step's settings."""
        settings = self.step.config.optimizer
        return AdamRules(
            tuple(self.step.learning_rates),
            settings.beta1,
            settings.beta2,
            settings.epsilon,
            settings.weight_decay,
            settings.clip_grad,
        )

    def run(self, substitution: Substitution | None = None) -> Replayed:
        """Make the step's updates, with one thing substituted.

        Raises:
            CannotRecompute: as `check_updates`."""
        self.check_updates()
        substitution = substitution or Substitution("")
        rows = self.rows
        if substitution.advantages is not None:
            rows = [
                replace(row, advantage=substitution.advantages[place.place[0]][place.place[1]])
                for row, place in zip(rows, self.sequences, strict=True)
            ]
        reference = self.reference
        if substitution.reference == "policy":
            reference = self._old_of_all
        elif substitution.reference == "begin":
            begin = weights_after(self.step.folder, self.step.run_config, 0)
            assert begin is not None, "the substitution is offered where the model is there"
            reference = replay.logprobs(self.model(begin), rows, [self.temperature])[0]
        loss = replace(self.loss_rules(), **dict(substitution.loss))
        old = self._old_of_all
        if loss.temperature != self.temperature:
            old = replay.logprobs(self.policy, rows, [loss.temperature])[0]
        model = copy.deepcopy(self._trained)
        made = StepReplay(
            model,
            None if substitution.without_moments else self._moments,
            0 if substitution.without_moments else self.num_updates,
            rows,
            old,
            reference,
        )
        adam = replace(self.adam_rules(), **dict(substitution.adam))
        updates = made.run(self.minibatches(), loss, adam)
        metrics, terms = _means(updates)
        change, by_parameter = self._compare(model)
        return Replayed(metrics, terms, change, by_parameter)

    @cached_property
    def base(self) -> Replayed:
        """The updates as the settings say."""
        return self.run()

    @cached_property
    def _trained(self) -> Any:
        """What the optimizer changes: the policy, of 16 bits its master weights."""
        if self.step.run_config.model.dtype == "float32" or self._is_begin:
            return self.policy
        return self.model(self._before, f"{replay.STATE}param.")

    @cached_property
    def _model_after(self) -> Any:
        """The same after the step; None where no checkpoint has it."""
        after, dtype = self.step.after, self.step.run_config.model.dtype
        if after is None:
            return None
        return self.model(after, "" if dtype == "float32" else f"{replay.STATE}param.")

    def _compare(self, model: Any) -> tuple[float | None, list[tuple[str, float]]]:
        if self._model_after is None:
            return None, []
        found = replay.distances(model, self._model_after, self._trained)
        apart = sum(gap**2 for gap, _ in found.values()) ** 0.5
        moved = sum(change**2 for _, change in found.values()) ** 0.5
        by_name = {
            name: _ratio(gap, change) for name, (gap, change) in found.items() if gap or change
        }
        ordered = sorted(by_name.items(), key=lambda item: -item[1])
        return _ratio(apart, moved), ordered


def _ratio(gap: float, change: float) -> float:
    return gap / change if change else (0.0 if gap == 0 else float("inf"))


def _means(updates: Sequence[Update]) -> tuple[dict[str, float], dict[str, float]]:
    metrics = {
        name: max(each.metrics[name] for each in updates)
        if name.endswith("/max")
        else sum(each.metrics[name] for each in updates) / len(updates)
        for name in updates[0].metrics
    }
    terms = {
        name: sum(abs(each.terms[name]) for each in updates) / len(updates)
        for name in updates[0].terms
    }
    return metrics, terms


def _row(sequence: TokenSequence, is_cut: bool) -> Row:
    kept = sequence.kept
    if kept is None and is_cut:  # no ids for any token, which `replay` refuses
        kept = decode_mask(b"", int(sequence.is_sampled.sum()))
    return Row(
        torch.from_numpy(sequence.token_ids.astype(np.int64)),
        torch.from_numpy(sequence.is_sampled.copy()),
        torch.from_numpy(sequence.logprobs.copy()),
        sequence.place[0] * 1_000_000 + sequence.place[1],
        sequence.advantage,
        sequence.num_sampled,
        kept and (torch.tensor(kept.counts), torch.from_numpy(kept.ids.astype(np.int64))),
    )
