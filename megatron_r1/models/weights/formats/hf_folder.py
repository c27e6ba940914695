"""The weights of a Hugging Face folder, plain or quantized, read rectangle by rectangle."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Self

import torch
from r1_kernels import dequantize_blockwise
from torch import Tensor

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.base.files.weight_files import (
    IGNORED_SUFFIXES,
    StoredTensor,
    require_as_indexed,
    weight_files,
)
from megatron_r1.models.hf_config import HFConfig
from megatron_r1.models.weights.formats import published_layout, quantized_blocks
from megatron_r1.models.weights.formats.folder_mismatch import mismatch_hint, shorten_names
from megatron_r1.models.weights.formats.known_scales import read_scales
from megatron_r1.models.weights.formats.published_layout import published_tensors
from megatron_r1.models.weights.formats.stacked_experts import StackedPart, stacked_part
from megatron_r1.models.weights.formats.tensor_files import SafetensorsFile
from megatron_r1.models.weights.layout import Shape, hf_tensors
from megatron_r1.models.weights.table import weight_table

FLOAT_DTYPES = {
    "F32": "float32",
    "BF16": "bfloat16",
    "F16": "float16",
    "F8_E4M3": published_layout.FP8_DTYPE,
}


class HFWeights:
    """The tensors of the safetensors checkpoint in `folder` of a model with configuration
    `hf_config`.

    Reads `model.safetensors.index.json` and its files, or one `model.safetensors`; `check` compares
    names and shapes with `hf_config`.

    Raises:
        UserError: a file is missing or damaged.
    """

    def __init__(self, folder: str | Path, hf_config: HFConfig):
        self.path, self.hf_config = Path(folder), hf_config
        self.files = [SafetensorsFile(file) for file in weight_files(self.path)]
        self._home: dict[str, SafetensorsFile] = {}
        self._stored: dict[str, StoredTensor] = {}
        require_as_indexed(self.path, {file.path: file.tensors.keys() for file in self.files})
        for file in self.files:
            self._home |= dict.fromkeys(file.tensors, file)
            self._stored |= file.tensors
        self.duplicate_of = weight_table(hf_config).duplicate_of
        self._repeated: dict[str, list[str]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for file in self.files:
            file.close()

    @cached_property
    def tensors(self) -> dict[str, tuple[Shape, str]]:
        """The (shape, stored dtype) of every tensor in the weight table, by name."""
        tensors = {}
        for name, (shape, _) in hf_tensors(self.hf_config).items():
            part = stacked_part(self.hf_config, name)
            home = part.name if part else name
            if home in self._stored:
                stored_tensor = self._stored[home]
                tensor_shape = shape if part else stored_tensor.shape
                tensors[name] = (
                    tensor_shape,
                    FLOAT_DTYPES.get(stored_tensor.dtype, stored_tensor.dtype),
                )
            elif quantized_blocks.blocks_name(home) in self._stored:
                tensors[name] = (shape, "bfloat16")
        return tensors

    def read(self, name: str, dim: int, start: int, length: int) -> Tensor:
        """Return `length` rows (dim 0) or columns (dim 1), in the stored dtype; FP8 as fp32 values.

        A tensor of `WeightTable.duplicate_of` that the folder lacks is read from its original.

        Args:
            name: the tensor's name.
            dim: 0 for rows, 1 for columns.
            start: the first of them.
            length: how many.

        Raises:
            UserError: after `check`, where a copy that the folder has differs from its original.
        """
        values = self._read_slice(name, dim, start, length)
        for copy in self._repeated.get(name, ()):
            if not torch.equal(self._read_slice(copy, dim, start, length).to(values.dtype), values):
                raise UserError(
                    self._difference_message(copy, name), key="weights", cause=Cause.CONFLICT
                )
        return values

    def _read_slice(self, name: str, dim: int, start: int, length: int) -> Tensor:
        if part := stacked_part(self.hf_config, name):
            return self._read_stacked(part, dim, start, length)
        name = name if name in self._stored else self.duplicate_of.get(name, name)
        shape = self._stored[name].shape
        starts, sizes = [0] * len(shape), list(shape)
        starts[dim], sizes[dim] = start, length
        if not self._is_fp8(name):
            return self.read_stored(name, starts, sizes)
        # Whole blocks around the rectangle, which may begin and end inside a block.
        first = tuple(s // published_layout.FP8_BLOCK_SIZE for s in starts)
        last = tuple(
            -(-(s + n) // published_layout.FP8_BLOCK_SIZE)
            for s, n in zip(starts, sizes, strict=True)
        )
        block_starts = tuple(f * published_layout.FP8_BLOCK_SIZE for f in first)
        ends = tuple(
            min(x * published_layout.FP8_BLOCK_SIZE, full)
            for x, full in zip(last, shape, strict=True)
        )
        q = self.read_stored(
            name, block_starts, tuple(e - o for e, o in zip(ends, block_starts, strict=True))
        )
        blocks = tuple(x - f for x, f in zip(last, first, strict=True))
        scales = read_scales(
            self._home[published_layout.scale_name(name)],
            published_layout.scale_name(name),
            first,
            blocks,
        )
        values = dequantize_blockwise(q, scales, dtype=torch.float32)
        for axis, (block_start, box_start, size) in enumerate(
            zip(block_starts, starts, sizes, strict=True)
        ):
            values = values.narrow(axis, box_start - block_start, size)
        return values

    def has(self, name: str) -> bool:
        """Whether the folder has the tensor of this name, plain or quantized."""
        return name in self._stored or quantized_blocks.blocks_name(name) in self._stored

    def read_whole(self, name: str) -> Tensor:
        """Return a tensor by its name in the folder, also one that has all experts of a layer;
        dtypes as `read`, MXFP4 as bf16."""
        if name in self._stored:
            return self.read(name, 0, 0, self._stored[name].shape[0])
        blocks = quantized_blocks.blocks_name(name)
        scales = quantized_blocks.scales_name(name)
        experts = range(self._stored[blocks].shape[0])
        parts = [(self._read_expert(blocks, i), self._read_expert(scales, i)) for i in experts]
        return torch.stack([quantized_blocks.dequantize_mxfp4(*part).T for part in parts])

    def _read_stacked(self, part: StackedPart, dim: int, start: int, length: int) -> Tensor:
        """Return rows or columns of one expert's tensor, as `read`."""
        if part.name in self._stored:
            starts, sizes = part.stored_region(
                self._stored[part.name].shape[1:], dim, start, length
            )
            return part.select(self.read_stored(part.name, (part.expert, *starts), (1, *sizes))[0])
        blocks, scales = (
            self._read_expert(name, part.expert)
            for name in (
                quantized_blocks.blocks_name(part.name),
                quantized_blocks.scales_name(part.name),
            )
        )
        return part.select(quantized_blocks.dequantize_mxfp4(blocks, scales).T).narrow(
            dim, start, length
        )

    def _read_expert(self, name: str, expert: int) -> Tensor:
        expert_shape = self._stored[name].shape[1:]
        return self.read_stored(name, (expert, *(0 for _ in expert_shape)), (1, *expert_shape))[0]

    def read_stored(self, name: str, starts: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """Return a rectangle of a tensor as it is stored: FP8 codes, or their scales.

        Args:
            name: the stored tensor's name.
            starts: first index along each dimension.
            sizes: the shape of the rectangle."""
        return self._home[name].read(name, starts, sizes)

    def scales(self, name: str) -> Tensor | None:
        """Return all scales of an FP8 tensor, fp32 of `published_layout.scale_shape`; None for
        another."""
        scale = published_layout.scale_name(name)
        if (stored_scale := self._stored.get(scale)) is None:
            return None
        return read_scales(
            self._home[scale], scale, (0,) * len(stored_scale.shape), stored_scale.shape
        )

    def check(self, with_mtp: bool) -> None:
        """Raise UserError naming every missing, unexpected or mis-shaped tensor."""
        hf_config = self.hf_config
        published_shapes = published_tensors(hf_config)
        tensor_names = published_tensors(hf_config, with_mtp).keys() - self.duplicate_of.keys()
        # As MXFP4, which only stacked experts have, two others are stored instead.
        expected: dict[str, Shape] = {}
        for name in tensor_names:
            shape = published_shapes[name][0]
            is_packed = (
                name not in self._stored and quantized_blocks.blocks_name(name) in self._stored
            )
            packed_shapes = quantized_blocks.stored_shapes(shape) if is_packed else {}
            expected |= {name + ending: s for ending, s in packed_shapes.items()} or {name: shape}
        mismatches, has_unreadable, scales = [], False, set()
        for name in sorted(expected.keys() & self._stored.keys()):
            stored_tensor = self._stored[name]
            is_float = name not in published_shapes or stored_tensor.dtype in FLOAT_DTYPES
            has_unreadable |= not is_float
            if stored_tensor.shape != expected[name]:
                mismatches.append(
                    f"{name} is {stored_tensor.shape}, config.json says {expected[name]}"
                )
            elif not is_float:
                mismatches.append(
                    f"{name} is {stored_tensor.dtype}, only {', '.join(FLOAT_DTYPES)} can be read"
                )
            elif stored_tensor.dtype == "F8_E4M3":
                scales.add(published_layout.scale_name(name))
                mismatches += self._wrong_scales(name, stored_tensor.shape)
        is_fp8 = {name for name in published_shapes if name in self._stored and self._is_fp8(name)}
        if scales:
            published_layout.check_fp8_layout(hf_config)
        missing_names = sorted(expected.keys() - self._stored.keys())
        missing_names += sorted(scales - self._stored.keys())
        self._repeated = self._find_repeated(with_mtp)
        repeated_names = {copy for copies in self._repeated.values() for copy in copies}
        extra_names = sorted(
            name
            for name in self._stored.keys()
            - published_shapes.keys()
            - expected.keys()
            - repeated_names
            if not name.endswith(IGNORED_SUFFIXES)
            and name.removesuffix("_scale_inv") not in is_fp8
            # transformers writes shared experts of 0 features where n_shared_experts is 0.
            and 0 not in self._stored[name].shape
        )
        problems = [
            f"{label} ({len(names)}): {shorten_names(names)}"
            for label, names in (
                ("missing", missing_names),
                ("unexpected", extra_names),
                ("wrong", mismatches),
            )
            if names
        ]
        if problems:
            raise UserError(
                f"checkpoint {self.path} does not fit its config.json: {'; '.join(problems)}"
                + mismatch_hint(missing_names, extra_names, has_unreadable, hf_config),
                key="weights",
                cause=Cause.CONFLICT,
            )

    def check_repeated(self, num_rows: int = 4096) -> None:
        """Raise UserError where tensors that must be equal differ; call after `check`."""
        for name in self._repeated:
            height = self._stored[name].shape[0]
            for start in range(0, height, num_rows):
                self.read(name, 0, start, min(num_rows, height - start))

    def _find_repeated(self, with_mtp: bool) -> dict[str, list[str]]:
        """Return tensor -> the other tensors in the folder that must equal it.

        They are the embedding and the head that MTP layers share with the model, and a head where
        the embedding is the head."""
        pairs = list(self.duplicate_of.items()) if with_mtp else []
        if self.hf_config.get("tie_word_embeddings"):
            pairs.append(("lm_head.weight", "model.embed_tokens.weight"))
        names_by_content: dict[str, list[str]] = {}
        for copy, original in pairs:
            if copy in self._stored and original in self._stored:
                names_by_content.setdefault(original, []).append(copy)
        return names_by_content

    def _difference_message(self, copy: str, original: str) -> str:
        remedy = "leave the MTP layers out (model.mtp: none)"
        if copy == "lm_head.weight":
            remedy = "set tie_word_embeddings to false in config.json, or remove the tensor"
        return (
            f"checkpoint {self.path}: {copy} differs from {original}, but in this model both are "
            f"one tensor; {remedy}"
        )

    def _is_fp8(self, name: str) -> bool:
        return self._stored[name].dtype == "F8_E4M3"

    def _wrong_scales(self, name: str, shape: Shape) -> list[str]:
        scale = published_layout.scale_name(name)
        if (stored_scale := self._stored.get(scale)) is None:
            return []
        if (
            stored_scale.dtype in published_layout.SCALE_TYPES
            and stored_scale.shape == published_layout.scale_shape(shape)
        ):
            return []
        types = (
            f"{', '.join(published_layout.SCALE_TYPES[:-1])} or {published_layout.SCALE_TYPES[-1]}"
        )
        return [
            f"{scale} is {stored_scale.dtype} {stored_scale.shape}, not {types} "
            f"{published_layout.scale_shape(shape)}"
        ]
