"""Log-probabilities of a step's tokens by transformers, once and when they are asked for: under the
policy before the step, earlier ones and the reference, and under changed ones."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from megatron_r1.models.sampling_mask import decode_mask
from megatron_r1.why.comparison import CannotRecompute
from megatron_r1.why.policy import adapters, checkpoint_model, routed_experts, token_logprobs
from megatron_r1.why.policy.token_logprobs import TokenRow
from megatron_r1.why.record.recorded_step import RecordedStep, TokenSequence, weights_after

LOGPROB_FLOPS = 1e13
"""Floating-point operations of a pass over logged tokens: minutes on two cores. Of more tokens a
part is computed."""
KEPT_MODELS = 40
"""Models are kept where so many fit into the free memory."""


class PolicyLogprobs:
    """Log-probabilities of a step's tokens under the policies that it used, and under others.

    Raises:
        CannotRecompute: weights are missing, or too large for this machine.
    """

    def __init__(self, step: RecordedStep) -> None:
        self.step = step
        self.sequences = step.sequences
        is_cut = step.config.rollout.truncates_sampling
        self.rows = [_row(sequence, is_cut) for sequence in self.sequences]
        self._logprobs_of_weights: dict[Path, list[np.ndarray]] = {}
        self._models: dict[tuple[Path, str], Any] = {}

    @property
    def temperature(self) -> float:
        """The step's sampling temperature."""
        return self.step.config.rollout.temperature

    @cached_property
    def scored_sequences(self) -> list[int]:
        """The sequences whose log-probabilities are computed: all, or every n-th where all would
        take too long."""
        cost = 2.0 * self.num_parameters * sum(len(row.token_ids) for row in self.rows)
        stride = max(1, int(np.ceil(cost / LOGPROB_FLOPS)))
        return list(range(0, len(self.rows), stride))

    @cached_property
    def num_parameters(self) -> int:
        """How many values the policy's weights have, on which the operations of a pass depend."""
        from megatron_r1.models.weights import num_parameters

        return num_parameters(self.step.hf_config)

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
        """Return the model in a checkpoint or folder; it is cached, so callers must not change it.

        Args:
            source: the checkpoint or folder.
            prefix: as of `read_model`.

        Raises:
            CannotRecompute: it does not fit into memory, or is not there."""
        longest = max((len(row.token_ids) for row in self.rows), default=0)
        logits = max(token_logprobs.LOGITS_AT_ONCE, longest * self.step.hf_config["vocab_size"])
        num_bytes = 6 * self.num_parameters + token_logprobs.BYTES_PER_LOGIT * logits
        free_bytes = psutil.virtual_memory().available
        if num_bytes > free_bytes:
            raise CannotRecompute(
                f"the model and the logits of its longest response need {num_bytes / 1e9:.0f} GB, "
                f"{free_bytes / 1e9:.0f} GB are free"
            )
        key = source, prefix
        if key not in self._models:
            loaded = self._read_model(source, prefix)
            if 4 * self.num_parameters * KEPT_MODELS > free_bytes:
                return loaded
            self._models[key] = loaded
        return self._models[key]

    def _read_model(self, source: Path, prefix: str) -> Any:
        lora, hf_files = self.step.run_config.model.lora, self.step.model
        base = weights_after(self.step.folder, self.step.run_config, 0)
        if lora is None or source in (base, self.step.folder.hf_folder):
            return checkpoint_model.read_model(source, hf_files, prefix)
        if base is None:
            raise CannotRecompute(
                f"model.path: {self.step.run_config.model.path}, which the adapters of "
                f"{source} belong to, is not here (relative to {Path.cwd()})"
            )
        if "quantization_config" in self.step.hf_config:
            raise CannotRecompute("model.lora: the weights in model.path are quantized")
        return checkpoint_model.read_adapted_model(source, base, hf_files, lora, prefix)

    @cached_property
    def old(self) -> list[np.ndarray]:
        """Log-probabilities under the policy before the step, of `scored_sequences`, at the run's
        temperature."""
        return self.logprobs_under(self.policy)

    def packed_logprobs(
        self, packed: Sequence[Sequence[int]], *, restarts: bool
    ) -> list[np.ndarray] | None:
        """Return the log-probabilities with a micro-batch's rows as one sequence, in which each row
        attends to those before it; None where that changes nothing or one is too long.

        Args:
            packed: the rows of each micro-batch, in their order.
            restarts: whether positions begin anew with each row."""
        longest = max(
            (sum(len(self.rows[i].token_ids) for i in rows) for rows in packed), default=0
        )
        is_long = longest * self.step.hf_config["vocab_size"] > 4 * token_logprobs.LOGITS_AT_ONCE
        if is_long or not any(len(rows) > 1 for rows in packed):
            return None
        logprobs_by_row = list(self.old)
        for rows in packed:
            members = [self.rows[index] for index in rows]
            (of_all,) = self._logprobs_of(
                [one_row(members, restarts)], self.policy, self.temperature
            )
            ends = np.cumsum([int(row.is_sampled.sum()) for row in members])
            for index, part in zip(rows, np.split(of_all, ends[:-1]), strict=True):
                logprobs_by_row[index] = part
        return logprobs_by_row

    def logprobs_under(self, model: Any, temperature: float | None = None) -> list[np.ndarray]:
        """Return the log-probabilities of the tokens of `scored_sequences` under a model."""
        return self._logprobs_of(self._scored_rows, model, temperature or self.temperature)

    def _logprobs_of(
        self, rows: Sequence[TokenRow], model: Any, temperature: float
    ) -> list[np.ndarray]:
        (logprobs_by_row,) = token_logprobs.logprobs(model, rows, [temperature])
        return [row_logprobs.numpy() for row_logprobs in logprobs_by_row]

    @property
    def _scored_rows(self) -> list[TokenRow]:
        return [self.rows[index] for index in self.scored_sequences]

    def logprobs_at_temperatures(self, temperatures: Sequence[float]) -> list[list[np.ndarray]]:
        """Return those under the policy before the step, by temperature."""
        by_temperature = token_logprobs.logprobs(self.policy, self._scored_rows, temperatures)
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
        names = [
            name for name in self.policy.state_dict() if name.endswith(routed_experts.ROUTER_BIAS)
        ]
        if not names:
            return None
        changed = copy.deepcopy(self.policy)
        with torch.no_grad():
            for name in names:
                changed.state_dict()[name].zero_()
        return self.logprobs_under(changed)

    def with_adapter_scale(self, scale: float) -> list[np.ndarray] | None:
        """Return those under the policy before the step with adapters that are added with another
        scale; None for a model without adapters.

        Args:
            scale: in place of alpha / rank."""
        changed = adapters.with_scale(self.policy, scale)
        return None if changed is None else self.logprobs_under(changed)

    def routing_agreement(self, shift: int = 0) -> float:
        """Return the share (0 to 1) of the engine's experts of sampled tokens that the policy
        before the step would choose itself.

        Args:
            shift: as of `shifted_experts`; 0: each token's own.

        Raises:
            CannotRecompute: the log has no experts."""
        rows = shifted_experts(self._scored_rows, shift) if shift else self._scored_rows
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
        return routed_experts.chosen_experts(self.policy, own_experts(self._scored_rows))

    def without_replay(self) -> list[np.ndarray] | None:
        """Return those under the policy before the step with the experts that it chooses itself;
        None where the engine's are not replayed."""
        if not self.step.config.rl.routing_replay:
            return None
        return self._logprobs_of(own_experts(self._scored_rows), self.policy, self.temperature)

    def bfloat16_logprobs(self) -> list[np.ndarray]:
        """Return those under the policy before the step computed in bfloat16."""
        return self.logprobs_under(copy.deepcopy(self.policy).to(torch.bfloat16))

    def num_experts(self, layer: str) -> int:
        """Return how many experts a module of routed experts has."""
        return len(next(self.policy.get_submodule(layer).parameters()))

    def with_experts(self, layer: str, sources: Mapping[int, int]) -> list[np.ndarray]:
        """Return those under the policy before the step with some experts' weights exchanged.

        Args:
            layer: the module of routed experts.
            sources: expert → the one whose weights it has."""
        changed = copy.deepcopy(self.policy)
        with torch.no_grad():
            for parameter in changed.get_submodule(layer).parameters():
                values = parameter.detach().clone()
                for target, source in sources.items():
                    parameter[target] = values[source]
        return self.logprobs_under(changed)

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
        old_weights = dict(self.model(path).get_submodule(layer).named_parameters())
        changed = copy.deepcopy(self.policy)
        with torch.no_grad():
            for name, parameter in changed.get_submodule(layer).named_parameters():
                if name in old_weights:
                    parameter[expert] = old_weights[name][expert]
                elif parameter.requires_grad:  # a factor, which the model of step 0 has not
                    parameter[expert] = 0
        return self.logprobs_under(changed)

    def with_head_apart(self) -> list[np.ndarray] | None:
        """Return those with the head that a tied model had when the run began; None for a model
        that is not tied."""
        begin = weights_after(self.step.folder, self.step.run_config, 0)
        has_adapters = self.step.run_config.model.lora is not None  # the head is frozen
        if begin is None or has_adapters or not self.step.hf_config.get("tie_word_embeddings"):
            return None
        changed = copy.deepcopy(self.policy)
        changed.lm_head.weight = torch.nn.Parameter(self.model(begin).lm_head.weight.detach())
        return self.logprobs_under(changed)

    def all_token_logprobs(self) -> list[np.ndarray]:
        """Return the log-probabilities of all tokens but the first, those of the prompt too."""
        rows = [
            replace(row, is_sampled=torch.arange(len(row.token_ids)) > 0, kept=None)
            for row in self._scored_rows
        ]
        return self._logprobs_of(rows, self.policy, self.temperature)

    def plain_logprobs(self) -> list[np.ndarray]:
        """Return those under the policy before the step at temperature 1, over the whole
        vocabulary."""
        rows = [replace(row, kept=None) for row in self._scored_rows]
        return self._logprobs_of(rows, self.policy, 1.0)

    def shifted_logprobs(self) -> list[np.ndarray]:
        """Return, in place of each sampled token's, the log-probability of the token before it."""
        rows = [replace(row, targets=row.token_ids.roll(1)) for row in self._scored_rows]
        return self._logprobs_of(rows, self.policy, self.temperature)

    def experts(self) -> dict[str, list[np.ndarray]]:
        """Return the experts that the policy before the step chooses for the tokens of
        `scored_sequences`, by layer: (tokens, experts per token) each."""
        by_layer = routed_experts.chosen_experts(self.policy, self._scored_rows)
        return {
            name: [row_experts.numpy() for row_experts in experts_by_row]
            for name, experts_by_row in by_layer.items()
        }

    @cached_property
    def reference(self) -> list[Tensor] | None:
        """Log-probabilities of all rows under the reference of the checkpoint; None without KL."""
        if not self.step.config.rl.kl_beta:
            return None
        if self._is_begin and not self.step.config.rl.routing_replay:
            return self._old_of_all
        rows, model = own_experts(self.rows), self.reference_model
        return token_logprobs.logprobs(model, rows, [self.temperature])[0]

    @property
    def reference_model(self) -> Any:
        """The reference of the checkpoint, in the first step the policy."""
        if self._is_begin:
            return self.policy
        return self.model(self._before, checkpoint_model.REFERENCE)

    @cached_property
    def _old_of_all(self) -> list[Tensor]:
        if len(self.scored_sequences) == len(self.rows):
            return [torch.from_numpy(row_logprobs) for row_logprobs in self.old]
        return token_logprobs.logprobs(self.policy, self.rows, [self.temperature])[0]

    @property
    def _is_begin(self) -> bool:
        """Whether the step is the run's first."""
        return self.step.step == 1


def shifted_experts(rows: Sequence[TokenRow], shift: int) -> list[TokenRow]:
    """Return rows with the engine's experts moved to other tokens; those of the tokens that get
    none are the router's choice.

    Args:
        rows: the sequences.
        shift: 1: to the token after; -1: to the token before."""
    shifted = []
    for row in rows:
        experts = None
        if row.experts is not None:
            experts = torch.full_like(row.experts, -1)
            source, target = (slice(-1), slice(1, None))[::shift]
            experts[target] = row.experts[source]
        shifted.append(replace(row, experts=experts))
    return shifted


def one_row(rows: Sequence[TokenRow], restarts: bool) -> TokenRow:
    """Return rows end to end as one.

    Args:
        rows: the rows.
        restarts: whether positions begin anew with each."""
    kept_ids = [row.kept for row in rows if row.kept is not None]
    experts = [row.experts for row in rows if row.experts is not None]
    token_ids = torch.cat([row.token_ids for row in rows])
    positions = [torch.arange(len(row.token_ids)) for row in rows]
    return replace(
        rows[0],
        token_ids=token_ids,
        is_sampled=torch.cat([row.is_sampled for row in rows]),
        kept=(
            torch.cat([counts for counts, _ in kept_ids]),
            torch.cat([ids for _, ids in kept_ids]),
        )
        if kept_ids
        else None,
        experts=torch.cat(experts) if experts else None,
        positions=torch.cat(positions) if restarts else torch.arange(len(token_ids)),
    )


def own_experts(rows: Sequence[TokenRow]) -> list[TokenRow]:
    """Return rows whose experts the model chooses, as the trainer's reference does."""
    return [replace(row, experts=None) for row in rows]


def _row(sequence: TokenSequence, is_cut: bool) -> TokenRow:
    kept_ids = sequence.kept
    if kept_ids is None and is_cut:  # no ids for any token, which `token_logprobs` refuses
        kept_ids = decode_mask(b"", int(sequence.is_sampled.sum()))
    return TokenRow(
        torch.from_numpy(sequence.token_ids.astype(np.int64)),
        torch.from_numpy(sequence.is_sampled.copy()),
        torch.from_numpy(sequence.logprobs.copy()),
        sequence.response[0] * 1_000_000 + sequence.response[1],
        sequence.advantage,
        sequence.num_sampled,
        kept_ids
        and (torch.tensor(kept_ids.counts), torch.from_numpy(kept_ids.ids.astype(np.int64))),
        experts=None if sequence.experts is None else torch.from_numpy(sequence.experts),
    )
