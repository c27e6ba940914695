"""Computes log-probabilities of a step's tokens under the policy before it with one part changed.

The parts are those that may be wrong in a run; the policy may be a streamed model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor

from megatron_r1.why.policy import routed_experts
from megatron_r1.why.policy.step_logprobs import StepLogprobs
from megatron_r1.why.policy.step_models import require_in_memory
from megatron_r1.why.policy.tensor_source import HEAD_NAME
from megatron_r1.why.record.recorded_step import weights_after


class ChangedPartLogprobs:
    """Log-probabilities of a step's tokens under the policy before it with a part of its weights
    changed.

    Args:
        policies: the step's log-probabilities."""

    def __init__(self, policies: StepLogprobs) -> None:
        self._policies, self._models, self._step = policies, policies.models, policies.step

    def logprobs_without_router_bias(self) -> list[np.ndarray] | None:
        """Return log-probabilities under the step's policy with routers that have no correction
        bias; None for a model without such a bias."""
        if self._models.is_streamed:
            return self._streamed_logprobs_without_router_bias()
        names = [
            name
            for name in self._models.policy.state_dict()
            if name.endswith(routed_experts.ROUTER_BIAS)
        ]
        if not names:
            return None
        model = copy.deepcopy(self._models.policy)
        with torch.no_grad():
            for name in names:
                model.state_dict()[name].zero_()
        return self._policies.logprobs_under(model)

    def logprobs_with_adapter_scale(self, scale: float) -> list[np.ndarray] | None:
        """Return log-probabilities under the step's policy with adapters that are added with
        another scale; None for a model without adapters.

        Args:
            scale: in place of alpha / rank."""
        model = self._models.policy_with_adapter_scale(scale)
        return None if model is None else self._policies.logprobs_under(model)

    def num_experts(self, layer: str) -> int:
        """Return how many experts a module of routed experts has."""
        model = self._models.policy.skeleton if self._models.is_streamed else self._models.policy
        return len(next(model.get_submodule(layer).parameters()))

    def logprobs_with_experts(self, layer: str, sources: Mapping[int, int]) -> list[np.ndarray]:
        """Return log-probabilities under the step's policy with some experts' weights exchanged.

        Args:
            layer: the module of routed experts.
            sources: expert → the one whose weights it has."""
        model = copy.deepcopy(require_in_memory(self._models.policy))
        with torch.no_grad():
            for parameter in model.get_submodule(layer).parameters():
                values = parameter.detach().clone()
                for target, source in sources.items():
                    parameter[target] = values[source]
        return self._policies.logprobs_under(model)

    def logprobs_with_old_expert(
        self, layer: str, expert: int, step: int
    ) -> list[np.ndarray] | None:
        """Return log-probabilities under the step's policy with one expert's weights after another
        step; None where they are not kept.

        Args:
            layer: the module of routed experts.
            expert: its number.
            step: the other step; 0: the model that the run began with."""
        path = weights_after(self._step.folder, self._step.run_config, step)
        if path is None:
            return None
        if self._models.is_streamed:
            old_source, beginning = self._models.tensors(path), f"{layer}.{expert}."
            return self._logprobs_with(
                {
                    name: partial(old_source.read, name)
                    for name in old_source.shapes
                    if name.startswith(beginning)
                }
            )
        old_weights = dict(
            require_in_memory(self._models.model(path)).get_submodule(layer).named_parameters()
        )
        model = copy.deepcopy(self._models.policy)
        with torch.no_grad():
            for name, parameter in model.get_submodule(layer).named_parameters():
                if name in old_weights:
                    parameter[expert] = old_weights[name][expert]
                elif parameter.requires_grad:  # a factor, which the model of step 0 has not
                    parameter[expert] = 0
        return self._policies.logprobs_under(model)

    def logprobs_with_head_apart(self) -> list[np.ndarray] | None:
        """Return those with the head that a tied model had when the run began; None for a model
        that is not tied."""
        begin = weights_after(self._step.folder, self._step.run_config, 0)
        has_adapters = self._step.run_config.model.lora is not None  # the head is frozen
        if begin is None or has_adapters or not self._step.hf_config.get("tie_word_embeddings"):
            return None
        if self._models.is_streamed:
            return self._logprobs_with(
                {HEAD_NAME: partial(self._models.tensors(begin).read, HEAD_NAME)}
            )
        model = copy.deepcopy(self._models.policy)
        head = require_in_memory(self._models.model(begin)).lm_head.weight.detach()
        model.lm_head.weight = torch.nn.Parameter(head)
        return self._policies.logprobs_under(model)

    def bfloat16_logprobs(self) -> list[np.ndarray]:
        """Return log-probabilities under the step's policy computed in bfloat16."""
        return self._policies.logprobs_under(
            copy.deepcopy(require_in_memory(self._models.policy)).to(torch.bfloat16)
        )

    def _streamed_logprobs_without_router_bias(self) -> list[np.ndarray] | None:
        shapes = self._models.policy.source.shapes
        names = [name for name in shapes if name.endswith(routed_experts.ROUTER_BIAS)]
        if not names:
            return None
        return self._logprobs_with({name: partial(torch.zeros, shapes[name]) for name in names})

    def _logprobs_with(self, values: Mapping[str, Callable[[], Tensor]]) -> list[np.ndarray]:
        """Return log-probabilities under the step's streamed policy with some other tensors."""
        source = self._models.policy.source.with_replacements(values)
        return self._policies.logprobs_under(self._models.policy.with_source(source))
