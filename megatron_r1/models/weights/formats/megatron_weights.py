"""The weights in a Megatron distributed checkpoint: its tensors, the Hugging Face rows in each, and
their reading as Hugging Face tensors.

Megatron names and splits tensors by rules of its own (`sharded_state_dict`): the experts of a
layer are one tensor with the expert as first axis; the layers of a model whose layers are all
alike are one tensor with the layer as first axis; in grouped-query layers the norms have the names
of those inside Transformer Engine's linear layers, also with Megatron's own layers. All of it
follows from the weight table; tests compare it with what Megatron saves."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.models.hf_config import HFConfig
from megatron_r1.models.weights.formats.dcp import DistributedCheckpoint
from megatron_r1.models.weights.layout import Shape, hf_tensors, parameter_layout, stage_shards
from megatron_r1.models.weights.splits import Piece
from megatron_r1.models.weights.table import weight_table

_EXPERT = re.compile(
    r"(?P<prefix>.*\.mlp\.experts)\."
    r"(?:local_experts\.(?P<own>\d+)\.(?P<fc>linear_fc[12]\.(?:weight|bias))"
    r"|(?P<te_fc>linear_fc[12]\.(?:weight|bias))(?P<te>\d+))"
)
_LAYER = re.compile(r"decoder\.layers\.(?P<layer>\d+)\.(?P<rest>.*)")


@dataclass(frozen=True)
class StoredParameter:
    """One Megatron parameter inside a stored tensor.

    Attributes:
        key: the stored tensor's name.
        index: stored[index] is the parameter.
        shape: the parameter's shape.
        runs: which runs of its rows (dim 0) are rows of HF tensors."""

    key: str
    index: tuple[int, ...]
    shape: Shape
    runs: tuple[Piece, ...]


@dataclass
class StoredLayout:
    """The tensors of a stored Megatron checkpoint, and the HF rows that each holds.

    Attributes:
        slots: one for each Megatron parameter.
        shapes: key -> shape of the whole stored tensor, prepended axes first.
        dtypes: key -> dtype of a tensor whose dtype is not the model's.
        vocabulary: keys of tensors whose rows may be padded.
    """

    slots: list[StoredParameter] = field(default_factory=list)
    shapes: dict[str, Shape] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    vocabulary: set[str] = field(default_factory=set)

    def slots_by_hf_name(self) -> dict[str, list[tuple[StoredParameter, Piece]]]:
        """Return HF tensor -> the slots and runs with its rows, in row order."""
        by_name = defaultdict(list)
        for slot in self.slots:
            for run in slot.runs:
                by_name[run.hf_name].append((slot, run))
        for runs in by_name.values():
            runs.sort(key=lambda item: item[1].hf_start)
        return dict(by_name)


def stored_layout(
    hf_config: HFConfig,
    *,
    with_mtp: bool = True,
    transformer_engine: bool = False,
    stacked: bool | None = None,
) -> StoredLayout:
    """Return the layout of the model `hf_config` describes, without vocabulary padding.

    Args:
        hf_config: the model's `config.json`.
        with_mtp: whether the checkpoint has the MTP layers.
        transformer_engine: whether Transformer Engine's layers saved the checkpoint; only the names
            of latent attention differ.
        stacked: whether the layers are an axis of one tensor; None: as Megatron does, for
            models without experts.
    """
    table = weight_table(hf_config)
    if stacked is None:
        stacked = not table.num_experts
    fused_norms = transformer_engine or not hf_config.get("kv_lora_rank")
    ((shard,),) = stage_shards(hf_config, with_mtp=with_mtp)
    shard = replace(shard, transformer_engine=fused_norms)
    result = StoredLayout()
    first_axes: dict[str, list[int]] = {}
    for name, entry in parameter_layout(hf_config, shard).items():
        key, index = _stored_name(name, stacked)
        runs = tuple(_run_of_rows(piece, entry.shape) for piece in entry.pieces)
        result.slots.append(StoredParameter(key, index, entry.shape, runs))
        sizes = first_axes.setdefault(key, [0] * len(index))
        for axis, position in enumerate(index):
            sizes[axis] = max(sizes[axis], position + 1)
        result.shapes[key] = (*sizes, *entry.shape)
        if entry.dtype:
            result.dtypes[key] = entry.dtype
    result.vocabulary = {"embedding.word_embeddings.weight", "output_layer.weight"}
    result.vocabulary &= result.shapes.keys()
    return result


def _stored_name(name: str, stacked: bool) -> tuple[str, tuple[int, ...]]:
    index: tuple[int, ...] = ()
    # As it was called up to 0.16: MultiTokenPredictionLayer.sharded_state_dict keeps the name.
    name = name.replace(".mtp_model_layer.", ".transformer_layer.")
    if expert := _EXPERT.fullmatch(name):
        fc = expert["fc"] or expert["te_fc"]
        name = f"{expert['prefix']}.experts.{fc}"
        index = (int(expert["own"] or expert["te"]),)
    if stacked and (layer := _LAYER.fullmatch(name)):
        name, index = f"decoder.layers.{layer['rest']}", (int(layer["layer"]), *index)
    return name, index


def _run_of_rows(piece: Piece, shape: Shape) -> Piece:
    if piece.dim == 0:
        return piece
    assert (piece.hf_start, piece.local_start, piece.length) == (0, 0, shape[1]), (
        "one rank holds whole rows"
    )
    return Piece(piece.hf_name, 0, 0, 0, shape[0])


class MegatronWeights:
    """The HF tensors in the checkpoint `folder`, whose model has the configuration `hf_config`.

    It may have been saved at any layout, with Megatron's own layers or Transformer Engine's, with
    separate or stacked layers.

    Raises:
        UserError: the folder is not a complete checkpoint of this model.
    """

    def __init__(self, folder: str | Path, hf_config: HFConfig):
        self.path, self.hf_config = Path(folder), hf_config
        self.checkpoint = DistributedCheckpoint(folder)
        self.with_mtp = any(key.startswith("mtp.") for key in self.checkpoint.shapes)
        self.layout = self._recognize_layout()
        self.duplicate_of = weight_table(hf_config).duplicate_of
        self._runs = self.layout.slots_by_hf_name()
        self._check_shapes()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.checkpoint.close()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the model's parameters, except those with a dtype of their own."""
        return self.checkpoint.dtypes["embedding.word_embeddings.weight"]

    @cached_property
    def tensors(self) -> dict[str, tuple[Shape, str]]:
        """The (shape, stored dtype) of every tensor, by name, including an HF checkpoint's copies
        (`WeightTable.duplicate_of`)."""
        tensors = {}
        for name, (shape, _) in hf_tensors(self.hf_config, with_mtp=self.with_mtp).items():
            key = self._runs[self.duplicate_of.get(name, name)][0][0].key
            tensors[name] = (shape, str(self.checkpoint.dtypes[key]).removeprefix("torch."))
        return tensors

    def read(self, name: str, dim: int, start: int, length: int) -> Tensor:
        """Return `length` rows (dim 0) or columns (dim 1) of an HF tensor, in the stored dtype.

        Args:
            name: the tensor's name.
            dim: 0 for rows, 1 for columns.
            start: the first of them.
            length: how many.
        """
        parts = []
        for slot, run in self._runs[self.duplicate_of.get(name, name)]:
            first, end = run.hf_start, run.hf_start + run.length
            if dim == 0:
                first, end = max(first, start), min(end, start + length)
            if first >= end:
                continue
            starts = [run.local_start + first - run.hf_start, *(0 for _ in slot.shape[1:])]
            sizes = [end - first, *slot.shape[1:]]
            if dim == 1:
                starts[1], sizes[1] = start, length
            leading_sizes = (1,) * len(slot.index)
            values = self.checkpoint.read(
                slot.key, (*slot.index, *starts), (*leading_sizes, *sizes)
            )
            parts.append(values.view(sizes))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def check(self, with_mtp: bool) -> None:
        """Raise UserError when MTP layers are needed and the checkpoint has none."""
        if with_mtp and not self.with_mtp and weight_table(self.hf_config).mtp:
            raise UserError(
                f"checkpoint {self.path} has no MTP layers; leave them out (model.mtp: none)",
                key="model.mtp",
                cause=Cause.CONFLICT,
            )

    def _recognize_layout(self) -> StoredLayout:
        """Return the layout whose tensors are all in the checkpoint."""
        if any(key.startswith("adapters.") for key in self.checkpoint.shapes):
            raise UserError(
                f"checkpoint {self.path} holds adapters (model.lora), not a model; take the folder "
                "hf/ of its run, where they are merged",
                key="checkpoint",
                cause=Cause.UNSUPPORTED,
            )
        fewest_missing: list[str] | None = None
        for stacked, engine in product((None, True, False), (False, True)):
            layout = stored_layout(
                self.hf_config, with_mtp=self.with_mtp, transformer_engine=engine, stacked=stacked
            )
            missing_keys = sorted(layout.shapes.keys() - self.checkpoint.shapes.keys())
            if not missing_keys:
                return layout
            if fewest_missing is None or len(missing_keys) < len(fewest_missing):
                fewest_missing = missing_keys
        assert fewest_missing is not None
        raise UserError(
            f"checkpoint {self.path} does not fit the configuration of "
            f"{self.hf_config['architectures'][0]}: it lacks {', '.join(fewest_missing[:4])}"
            f"{f' … and {len(fewest_missing) - 4} more' if len(fewest_missing) > 4 else ''}; give "
            "the config.json it was trained with",
            key="checkpoint",
            cause=Cause.CONFLICT,
        )

    def _check_shapes(self) -> None:
        for key, expected in self.layout.shapes.items():
            actual_shape = self.checkpoint.shapes[key]
            # Rows beyond the vocabulary depend on the tensor-parallel size that saved it.
            is_padded = key in self.layout.vocabulary and actual_shape[0] > expected[0]
            if actual_shape != expected and not (is_padded and actual_shape[1:] == expected[1:]):
                raise UserError(
                    f"checkpoint {self.path} holds {key} as {actual_shape}, the configuration says "
                    f"{expected}: give the config.json it was trained with",
                    key="checkpoint",
                    cause=Cause.CONFLICT,
                )
