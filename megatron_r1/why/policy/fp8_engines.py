"""Computes log-probabilities under the weights that engines have after a push with `push.fp8`.
Projections are in e4m3 with a scale for each block of 128 x 128, the rest in bfloat16, a router's
bias in float32."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from r1_kernels import dequantize_blockwise
from torch import Tensor

from megatron_r1.models.weights.formats.published_layout import (
    has_power_of_two_scales,
    is_quantized,
)
from megatron_r1.models.weights.formats.quantized_blocks import quantize_fp8
from megatron_r1.why.policy import checkpoint_model
from megatron_r1.why.policy.routed_experts import ROUTER_BIAS
from megatron_r1.why.policy.step_logprobs import StepLogprobs
from megatron_r1.why.policy.step_models import StepModels
from megatron_r1.why.policy.tensor_source import TensorSource
from megatron_r1.why.record.recorded_step import RecordedStep, weights_after


def pushed_values(
    name: str, values: Tensor, *, rounds_scales_up: bool, scales_of: Tensor | None = None
) -> Tensor:
    """Return what an engine computes with after a push with `push.fp8`, fp32.

    Args:
        name: the tensor's published name.
        values: its values in the trainer.
        rounds_scales_up: whether scales are rounded up to powers of two.
        scales_of: other values of the tensor, whose blocks' scales the engine has; None: its own.
    """
    if not is_quantized(name):
        return values if name.endswith(ROUTER_BIAS) else values.bfloat16().float()
    codes, scales = quantize_fp8(values, power_of_two=rounds_scales_up)
    if scales_of is not None:
        scales = quantize_fp8(scales_of, power_of_two=rounds_scales_up)[1]
    return dequantize_blockwise(codes, scales, dtype=torch.float32)


class FP8EngineModels(StepModels):
    """The models of a step as engines have them with `push.fp8`. The activations, which an engine
    on a GPU quantizes too, stay float32.

    Args:
        step: what the run recorded of it.
        memory: bytes that models may take; None: what is free."""

    def __init__(self, step: RecordedStep, memory: int | None = None) -> None:
        super().__init__(step, memory)
        self._rounds_scales_up = has_power_of_two_scales(step.hf_config)

    def tensors(self, source: Path, prefix: str = "") -> TensorSource:
        """Return the tensors of a model as the push makes them.

        Args:
            source: the checkpoint or folder.
            prefix: as of `read_model`."""
        encode = partial(pushed_values, rounds_scales_up=self._rounds_scales_up)
        return super().tensors(source, prefix).with_encoding(encode)

    def _read_model(self, source: Path, prefix: str) -> Any:
        return self._whole_model(self.tensors(source, prefix))

    def _whole_model(self, source: TensorSource) -> Any:
        tensors = {name: source.read(name) for name in source.shapes}
        return checkpoint_model.model_of(tensors, self.step.model)

    def _model_of(self, source: TensorSource) -> Any:
        """Return the model with the tensors of a source, streamed where the policy is."""
        if self.is_streamed:
            return self.policy.with_source(source)
        return self._whole_model(source)

    def policy_with_adapter_scale(self, scale: float) -> Any | None:
        """Return the model before the step with adapters of another scale, as `StepModels` does.

        Args:
            scale: in place of alpha / rank."""
        source = self.tensors(self.checkpoint_before)
        if source.adapters is None:
            return None
        rescaled = source.with_adapters(source.adapters._replace(scale=scale))
        return self._model_of(rescaled)

    def model_with_scales_of_step(self, step: int) -> Any | None:
        """Return the model with the newest 8-bit values and the scales of the weights after another
        step; None where these are not kept.

        Args:
            step: the other step; 0: the model that the run began with."""
        path = weights_after(self.step.folder, self.step.run_config, step)
        if path is None:
            return None
        older = super().tensors(path)

        def encode(name: str, values: Tensor) -> Tensor:
            scales_of = older.read(name) if is_quantized(name) else None
            return pushed_values(
                name, values, rounds_scales_up=self._rounds_scales_up, scales_of=scales_of
            )

        return self._model_of(super().tensors(self.checkpoint_before).with_encoding(encode))


class FP8EngineLogprobs(StepLogprobs):
    """Log-probabilities of a step's tokens under policies as engines have them with `push.fp8`.

    Args:
        trainer: the same step's log-probabilities under the trainer's weights.

    Raises:
        CannotRecompute: weights are missing, or too large for this machine."""

    models: FP8EngineModels

    def __init__(self, trainer: StepLogprobs) -> None:
        super().__init__(FP8EngineModels(trainer.step, trainer.models.memory))
        self.trainer = trainer
