"""Reads the weights of a checkpoint or of a model's folder, fp32, one tensor at a time: under their
published names, and as the parameters of transformers' classes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_r1.models.hf_config import HFConfig
from megatron_r1.models.weights.adapter_table import A, B
from megatron_r1.models.weights.formats.hf_folder import HFWeights
from megatron_r1.models.weights.formats.megatron_weights import MegatronWeights
from megatron_r1.models.weights.formats.stacked_experts import stacked_part
from megatron_r1.models.weights.layout import hf_tensors
from megatron_r1.why.comparison import CannotRecompute
from megatron_r1.why.policy.checkpoint_model import EXPERT_TENSOR_NAME, weights_of_part

EMBEDDING_NAME, HEAD_NAME = "model.embed_tokens.weight", "lm_head.weight"


class AdapterTensors(NamedTuple):
    """Low-rank adapters of a checkpoint.

    Attributes:
        names: the factors, by their layers' Hugging Face names.
        read: returns a factor, fp32.
        scale: alpha / rank."""

    names: frozenset[str]
    read: Callable[[str], Tensor]
    scale: float


class Place(NamedTuple):
    """Where a published tensor is in a parameter of transformers' classes.

    Attributes:
        parameter: the parameter's name.
        expert: the row of the parameter that is its expert's; None: it is of no expert.
        select: returns the tensor's part of the parameter, or of that row, as a view."""

    parameter: str
    expert: int | None
    select: Callable[[Tensor], Tensor]


class TensorSource:
    """The tensors of a checkpoint or of a Hugging Face folder, without MTP layers.

    Args:
        folder: the checkpoint or folder.
        hf_config: the model's `config.json`.
        prefix: as of `read_model`.

    Raises:
        UserError: the folder is incomplete, or another model's."""

    def __init__(self, folder: Path, hf_config: HFConfig, prefix: str = "") -> None:
        self.folder, self._hf_config = folder, hf_config
        self._weights: MegatronWeights | HFWeights = (
            HFWeights(folder, hf_config)
            if (folder / "config.json").is_file()
            else weights_of_part(folder, hf_config, prefix)
        )
        self._adapters: AdapterTensors | None = None
        self._replacements: dict[str, Callable[[], Tensor]] = {}
        self._encode: Callable[[str, Tensor], Tensor] | None = None

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor by its published name."""
        policy = hf_tensors(self._hf_config, with_mtp=False)
        return {
            name: tuple(shape)
            for name, (shape, _) in self._weights.tensors.items()
            if name in policy
        }

    @property
    def adapters(self) -> AdapterTensors | None:
        """The adapters that are added to the weights; None: there are none."""
        return self._adapters

    def with_adapters(self, adapters: AdapterTensors) -> TensorSource:
        """Return these weights with the products of adapters added."""
        source = copy.copy(self)
        source._adapters = adapters
        return source

    def with_replacements(self, values: Mapping[str, Callable[[], Tensor]]) -> TensorSource:
        """Return these weights with some others.

        Args:
            values: functions that return the others, by published name."""
        source = copy.copy(self)
        source._replacements = {**self._replacements, **values}
        return source

    def with_encoding(self, encode: Callable[[str, Tensor], Tensor]) -> TensorSource:
        """Return these weights, adapters added, as an encoding changes them.

        Args:
            encode: returns a tensor in place of the one that it is called with, after its published
                name; both fp32."""
        source = copy.copy(self)
        source._encode = encode
        return source

    def read(self, name: str) -> Tensor:
        """Return a tensor, fp32, by its published name, with its adapter and encoded; of a tied
        head, which is not among `shapes`, the embedding.

        Raises:
            CannotRecompute: there is no such tensor."""
        if name in self._replacements:
            return self._replacements[name]()
        if (
            name == HEAD_NAME
            and name not in self.shapes
            and self._hf_config.get("tie_word_embeddings")
        ):
            return self.read(EMBEDDING_NAME)
        if name not in self.shapes:
            raise CannotRecompute(f"{self.folder} has no {name}")
        values = self._weights.read(name, 0, 0, self.shapes[name][0]).float()
        layer = name.removesuffix(".weight")
        if self._adapters is not None and layer + A in self._adapters.names:
            a, b = self._adapters.read(layer + A), self._adapters.read(layer + B)
            values = values + self._adapters.scale * b @ a
        return values if self._encode is None else self._encode(name, values)

    def parameter(self, name: str, shape: tuple[int, ...], expert: int | None = None) -> Tensor:
        """Return a parameter or buffer of transformers' classes, fp32.

        Args:
            name: its name in the whole model.
            shape: its size in each dimension.
            expert: the row that is returned alone; None: all of it.

        Raises:
            CannotRecompute: it is made otherwise of published tensors than `locate_tensor` says."""
        places = self._places_by_parameter.get(name, {})
        if None in places or (not places and name == HEAD_NAME):
            published = places[None][0][0] if places else HEAD_NAME
            return self._check_shape(self.read(published), shape, published, name)
        out = torch.empty(shape if expert is None else shape[1:])
        num_filled = 0
        for row in places if expert is None else [expert]:
            for published, part in places.get(row, ()):
                target = part.select(out[row] if expert is None else out)
                values = self._check_shape(self.read(published), target.shape, published, name)
                target.copy_(values)
                num_filled += values.numel()
        if num_filled != out.numel():
            raise CannotRecompute(
                f"{self.folder} has {num_filled:,} of the {out.numel():,} values of {name} in "
                "transformers, so that its layers cannot be read one by one"
            )
        return out

    def _check_shape(
        self, values: Tensor, shape: tuple[int, ...], published: str, parameter: str
    ) -> Tensor:
        """Return the values of a published tensor where they have the shape of its part of a
        parameter."""
        if values.shape != shape:
            raise CannotRecompute(
                f"{published} of {self.folder} is {tuple(values.shape)}, its part of {parameter} "
                f"in transformers {tuple(shape)}: its layers cannot be read one by one"
            )
        return values

    @cached_property
    def _places_by_parameter(self) -> dict[str, dict[int | None, list[tuple[str, Place]]]]:
        """The published tensors of each parameter, by expert."""
        places: dict[str, dict[int | None, list[tuple[str, Place]]]] = {}
        for name in self.shapes:
            part = locate_tensor(name, self._hf_config)
            by_expert = places.setdefault(part.parameter, {})
            by_expert.setdefault(part.expert, []).append((name, part))
        return places


def locate_tensor(name: str, hf_config: HFConfig) -> Place:
    """Return where a published tensor is in transformers' classes, which have the experts of a
    layer in one tensor, gate and up together.

    Args:
        name: the name under which it is published.
        hf_config: the model's `config.json`."""
    if part := stacked_part(hf_config, name):
        return Place(part.name, part.expert, part.select)
    if (match := EXPERT_TENSOR_NAME.fullmatch(name)) is None:
        return Place(name, None, _select_all)
    stack, expert, kind = match.groups()
    if kind == "down":
        return Place(f"{stack}.down_proj", int(expert), _select_all)
    half = _first_half if kind == "gate" else _second_half
    return Place(f"{stack}.gate_up_proj", int(expert), half)


def _select_all(values: Tensor) -> Tensor:
    return values


def _first_half(values: Tensor) -> Tensor:
    return values[: len(values) // 2]


def _second_half(values: Tensor) -> Tensor:
    return values[len(values) // 2 :]
