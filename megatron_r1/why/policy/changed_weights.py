"""Changes any tensors of a copy of a step's policy in memory, computes log-probabilities of tokens
under it, and puts them back."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import parametrize

from megatron_r1.why.policy import token_logprobs
from megatron_r1.why.policy.step_logprobs import StepLogprobs
from megatron_r1.why.policy.step_models import require_in_memory
from megatron_r1.why.policy.transformers_adapters import merged_weights
from megatron_r1.why.record.recorded_step import weights_after


class ChangedWeights:
    """A copy of the policy before a step, in which tensors are changed and put back. Adapters are
    merged, and a tied head is a tensor of its own, as an engine may have it.

    Args:
        policies: the step's log-probabilities.

    Raises:
        NotInMemory: the model does not fit into memory."""

    def __init__(self, policies: StepLogprobs) -> None:
        self._policies = policies
        self._model = merged_copy(require_in_memory(policies.models.policy))

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The weights and buffers by name, in the order of the layers."""
        return {
            name: tensor
            for name, tensor in self._model.state_dict().items()
            if tensor.is_floating_point()
        }

    def version_tensors(self, step: int) -> dict[str, Tensor] | None:
        """Return the tensors that were others after another step; None where they are not kept.

        Args:
            step: the other step; 0: the model that the run began with."""
        policies = self._policies
        path = weights_after(policies.step.folder, policies.step.run_config, step)
        return None if path is None else self.other_tensors(policies.models.model(path))

    def other_tensors(self, model: Any) -> dict[str, Tensor]:
        """Return the tensors of another model that differ from the policy's.

        Args:
            model: the other model, as `StepModels.model` returns it."""
        other_weights = merged_weights(require_in_memory(model))
        return {
            name: other_weights[name]
            for name, tensor in self.tensors.items()
            if name in other_weights and not torch.equal(tensor, other_weights[name])
        }

    @torch.no_grad()
    def logprobs(self, values: Mapping[str, Tensor], sequences: Sequence[int]) -> list[np.ndarray]:
        """Return the log-probabilities of sequences with some tensors changed.

        Args:
            values: the changed tensors, by name.
            sequences: numbers of the step's sequences."""
        # Values may be views of the tensors that they replace.
        new_values = {name: value.clone() for name, value in values.items()}
        saved_values = {name: self.tensors[name].clone() for name in values}
        try:
            self._fill_tensors(new_values)
            (logprobs,) = token_logprobs.sampled_logprobs(
                self._model,
                [self._policies.models.rows[index] for index in sequences],
                [self._policies.temperature],
            )
        finally:
            self._fill_tensors(saved_values)
        return [row_logprobs.numpy() for row_logprobs in logprobs]

    def _fill_tensors(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self.tensors[name].copy_(value)


@torch.no_grad()
def merged_copy(model: Any) -> Any:
    """Return a copy of a model of transformers with its adapters merged, and with a head of its
    own."""
    model_copy = copy.deepcopy(model)
    for module in [*model_copy.modules()]:
        if parametrize.is_parametrized(module):
            for name in [*module.parametrizations]:
                value = getattr(module, name).detach().clone()
                parametrize.remove_parametrizations(module, name, leave_parametrized=False)
                getattr(module, name).copy_(value)
    head = model_copy.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    return model_copy
