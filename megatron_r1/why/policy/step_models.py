"""Reads the models of a step: the policy before it and those of other checkpoints, whole where they
fit into memory, else with their layers read one by one. `threads_for` chooses torch's threads for
their passes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_r1.base.errors import UserError
from megatron_r1.base.processes import host_memory
from megatron_r1.models.sampling_mask import decode_mask
from megatron_r1.models.transformers_model import build_without_weights
from megatron_r1.why.comparison import CannotRecompute
from megatron_r1.why.policy import (
    checkpoint_model,
    model_distance,
    token_logprobs,
    transformers_adapters,
)
from megatron_r1.why.policy.streamed_model import StreamedModel, stream_memory
from megatron_r1.why.policy.tensor_source import AdapterTensors, TensorSource
from megatron_r1.why.policy.token_rows import TokenRow
from megatron_r1.why.record.recorded_step import RecordedStep, weights_after
from megatron_r1.why.record.step_sequences import TokenSequence

KEPT_MODELS = 40
"""Models are kept where so many fit into the free memory."""
MAX_SINGLE_THREAD_FLOPS = 2.0**32
"""Floating-point operations of a pass over a step's tokens, a fraction of a second of one core, up
to which threads wait for each other longer than they compute."""


class NotInMemory(CannotRecompute):
    """Something needs a whole model, which does not fit into memory."""


class StepModels:
    """The models of a step, with the rows of tokens that they are for.

    A model that does not fit into memory is a `StreamedModel`, whose layers are read for each pass.

    Args:
        step: what the run recorded of it.
        memory: bytes that models may take; None: what is free."""

    def __init__(self, step: RecordedStep, memory: int | None = None) -> None:
        self.step, self.memory = step, memory
        self.sequences = step.sequences
        is_cut = step.config.rollout.uses_sampling_mask
        self.rows = [_make_token_row(sequence, is_cut) for sequence in self.sequences]
        self._models: dict[tuple[Path, str], Any] = {}
        self._sources: dict[tuple[Path, str], TensorSource] = {}

    @cached_property
    def num_parameters(self) -> int:
        """How many values the policy's weights have, on which the operations of a pass depend."""
        from megatron_r1.models.weights import num_parameters

        return num_parameters(self.step.hf_config)

    @property
    def pass_flops(self) -> float:
        """The floating-point operations of a forward pass over all rows."""
        return 2.0 * self.num_parameters * sum(len(row.token_ids) for row in self.rows)

    @cached_property
    def policy(self) -> Any:
        """The model before the step."""
        return self.model(self.checkpoint_before)

    def policy_with_adapter_scale(self, scale: float) -> Any | None:
        """Return the model before the step with adapters that are added with another scale; None
        for a model without adapters.

        Args:
            scale: in place of alpha / rank."""
        if self.is_streamed:
            source = self.policy.source
            if source.adapters is None:
                return None
            rescaled_source = source.with_adapters(source.adapters._replace(scale=scale))
            return self.policy.with_source(rescaled_source)
        return transformers_adapters.with_scale(self.policy, scale)

    @property
    def reference_model(self) -> Any:
        """The reference of the checkpoint, in the first step the policy."""
        if self.is_first_step:
            return self.policy
        return self.model(self.checkpoint_before, checkpoint_model.REFERENCE_PREFIX)

    @property
    def is_first_step(self) -> bool:
        """Whether the step is the run's first."""
        return self.step.step == 1

    @property
    def checkpoint_before(self) -> Path:
        """The checkpoint before the step.

        Raises:
            CannotRecompute: it is not kept."""
        before = self.step.checkpoint_before
        if before is None:
            raise CannotRecompute(
                f"there is no checkpoint of step {self.step.step - 1}: keep them with "
                "checkpoint.every: 1 and checkpoint.keep_every: 1"
            )
        return before

    @property
    def free_bytes(self) -> int:
        """The memory that models may take."""
        return host_memory.free_bytes() if self.memory is None else self.memory

    @property
    def model_bytes(self) -> int:
        """The memory that a whole model takes, with the logits of its longest response."""
        logits = max(
            token_logprobs.LOGITS_AT_ONCE, self._max_row_tokens * self.step.hf_config["vocab_size"]
        )
        return 6 * self.num_parameters + token_logprobs.BYTES_PER_LOGIT * logits

    @property
    def _max_row_tokens(self) -> int:
        return max((len(row.token_ids) for row in self.rows), default=0)

    @property
    def is_streamed(self) -> bool:
        """Whether the policy before the step is read layer by layer."""
        return isinstance(self.policy, StreamedModel)

    @cached_property
    def _exceeds_memory(self) -> bool:
        """Whether the step's models are streamed: all or none, by the memory that was free for the
        first."""
        return self.model_bytes > self.free_bytes

    def model(self, source: Path, prefix: str = "") -> Any:
        """Return the model in a checkpoint or folder; it is cached, so callers must not change it.
        One that does not fit into memory is a `StreamedModel`.

        Args:
            source: the checkpoint or folder.
            prefix: as of `read_model`.

        Raises:
            CannotRecompute: not even one of its layers fits, or it is not there.
            NotInMemory: the models before it fitted into memory, and it does not."""
        key = source, prefix
        if key in self._models:
            return self._models[key]
        exceeds_memory, free_bytes = self._exceeds_memory, self.free_bytes
        if exceeds_memory:
            memory = stream_memory(self._model_skeleton, free_bytes, self._max_row_tokens)
            return StreamedModel(self._model_skeleton, self.tensors(*key), memory)
        if self.model_bytes > free_bytes:
            raise NotInMemory(
                f"another model takes {self.model_bytes / 1e9:.1f} GB, {free_bytes / 1e9:.1f} GB "
                "are free"
            )
        model = self._read_model(source, prefix)
        if 4 * self.num_parameters * KEPT_MODELS <= free_bytes:
            self._models[key] = model
        return model

    @cached_property
    def _model_skeleton(self) -> Any:
        return build_without_weights(self.step.model, self.step.hf_config)

    def _read_model(self, source: Path, prefix: str) -> Any:
        lora, hf_files = self.step.run_config.model.lora, self.step.model
        base = self._adapted_base(source)
        if lora is None or base is None:
            return checkpoint_model.read_model(source, hf_files, prefix)
        return checkpoint_model.read_adapted_model(source, base, hf_files, lora, prefix)

    def tensors(self, source: Path, prefix: str = "") -> TensorSource:
        """Return the tensors of a model, which are read one at a time.

        Args:
            source: the checkpoint or folder.
            prefix: as of `read_model`."""
        key = source, prefix
        if key not in self._sources:
            lora, hf_config = self.step.run_config.model.lora, self.step.hf_config
            base = self._adapted_base(source)
            if lora is None or base is None:
                self._sources[key] = TensorSource(source, hf_config, prefix)
            else:
                names, read = checkpoint_model.read_adapter_factors(source, prefix)
                adapters = AdapterTensors(frozenset(names), read, lora.scale)
                self._sources[key] = TensorSource(base, hf_config).with_adapters(adapters)
        return self._sources[key]

    def _adapted_base(self, source: Path) -> Path | None:
        """Return the weights that the adapters of a checkpoint belong to; None where a checkpoint
        or folder has weights of its own."""
        base = weights_after(self.step.folder, self.step.run_config, 0)
        if self.step.run_config.model.lora is None or source in (base, self.step.folder.hf_folder):
            return None
        if base is None:
            raise CannotRecompute(
                f"model.path: {self.step.run_config.model.path}, which the adapters of "
                f"{source} belong to, is not here (relative to {Path.cwd()})"
            )
        if "quantization_config" in self.step.hf_config:
            raise CannotRecompute("model.lora: the weights in model.path are quantized")
        return base

    def distance(self, a: tuple[Path, str], b: tuple[Path, str]) -> float:
        """Return |a - b| / |b| over all weights of two models.

        Args:
            a: a checkpoint or folder, and the prefix of its tensors (`read_model`).
            b: another."""
        models = self.model(*a), self.model(*b)
        if any(isinstance(model, StreamedModel) for model in models):
            return model_distance.source_distance(self.tensors(*a), self.tensors(*b))
        return model_distance.relative_distance(*models)


def require_in_memory(model: Any) -> Any:
    """Return a model that is in memory.

    Raises:
        NotInMemory: it is streamed."""
    if isinstance(model, StreamedModel):
        raise NotInMemory("the model does not fit into memory as a whole")
    return model


def _make_token_row(sequence: TokenSequence, is_cut: bool) -> TokenRow:
    kept_ids = sequence.kept_ids
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


@contextlib.contextmanager
def threads_for(models: StepModels) -> Iterator[None]:
    """Compute in the block with one thread where a step is small.

    Args:
        models: the step's models and rows."""
    num_threads, is_small = torch.get_num_threads(), False
    with contextlib.suppress(CannotRecompute, UserError):  # the checks say why not
        is_small = models.pass_flops <= MAX_SINGLE_THREAD_FLOPS
    try:
        if is_small:
            torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(num_threads)
