"""Reads the weights in a Megatron distributed checkpoint as Hugging Face tensors."""

from __future__ import annotations

from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.models.weights.decoder import table
from megatron_r1.models.weights.layout import Shape, hf_tensors
from megatron_r1.models.weights.stored.dcp_reading import DistributedCheckpoint
from megatron_r1.models.weights.stored.megatron_names import StoredLayout, stored_layout


class MegatronWeights:
    """The HF tensors in the checkpoint `folder`, whose model has the configuration `hf`.

    It may have been saved at any layout, with Megatron's own layers or Transformer Engine's, with
    separate or stacked layers. Raises UserError when it is not a complete checkpoint of this model.
    """

    def __init__(self, folder: str | Path, hf: dict):
        self.path, self.hf = Path(folder), hf
        self.checkpoint = DistributedCheckpoint(folder)
        self.with_mtp = any(key.startswith("mtp.") for key in self.checkpoint.shapes)
        self.layout = self._recognize()
        self.copies = table(hf).copies
        self._runs = self.layout.by_hf_name()
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
        (`Table.copies`)."""
        tensors = {}
        for name, (shape, _) in hf_tensors(self.hf, with_mtp=self.with_mtp).items():
            key = self._runs[self.copies.get(name, name)][0][0].key
            tensors[name] = (shape, str(self.checkpoint.dtypes[key]).removeprefix("torch."))
        return tensors

    def read(self, name: str, dim: int, start: int, length: int) -> Tensor:
        """Return `length` rows (dim 0) or columns (dim 1) of an HF tensor, in the stored dtype."""
        parts = []
        for slot, run in self._runs[self.copies.get(name, name)]:
            first, end = run.hf_start, run.hf_start + run.length
            if dim == 0:
                first, end = max(first, start), min(end, start + length)
            if first >= end:
                continue
            starts = [run.local_start + first - run.hf_start, *(0 for _ in slot.shape[1:])]
            sizes = [end - first, *slot.shape[1:]]
            if dim == 1:
                starts[1], sizes[1] = start, length
            ones = (1,) * len(slot.index)
            values = self.checkpoint.read(slot.key, (*slot.index, *starts), (*ones, *sizes))
            parts.append(values.view(sizes))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def check(self, with_mtp: bool) -> None:
        """Raise UserError when MTP layers are needed and the checkpoint has none."""
        if with_mtp and not self.with_mtp and table(self.hf).mtp:
            raise UserError(
                f"checkpoint {self.path} has no MTP layers; leave them out (model.mtp: none)",
                key="model.mtp",
                cause=Cause.CONFLICT,
            )

    def _recognize(self) -> StoredLayout:
        """Return the layout whose tensors are all in the checkpoint."""
        if any(key.startswith("adapters.") for key in self.checkpoint.shapes):
            raise UserError(
                f"checkpoint {self.path} holds adapters (model.lora), not a model; take the folder "
                "hf/ of its run, where they are merged",
                key="checkpoint",
                cause=Cause.UNSUPPORTED,
            )
        fewest: list[str] | None = None
        for stacked, engine in product((None, True, False), (False, True)):
            tried = stored_layout(
                self.hf, with_mtp=self.with_mtp, transformer_engine=engine, stacked=stacked
            )
            missing = sorted(tried.shapes.keys() - self.checkpoint.shapes.keys())
            if not missing:
                return tried
            if fewest is None or len(missing) < len(fewest):
                fewest = missing
        assert fewest is not None
        raise UserError(
            f"checkpoint {self.path} does not fit the configuration of "
            f"{self.hf['architectures'][0]}: it lacks {', '.join(fewest[:4])}"
            f"{f' … and {len(fewest) - 4} more' if len(fewest) > 4 else ''}; give the "
            "config.json it was trained with",
            key="checkpoint",
            cause=Cause.CONFLICT,
        )

    def _check_shapes(self) -> None:
        for key, expected in self.layout.shapes.items():
            actual = self.checkpoint.shapes[key]
            # Rows beyond the vocabulary depend on the tensor-parallel size that saved it.
            padded = key in self.layout.vocabulary and actual[0] > expected[0]
            if actual != expected and not (padded and actual[1:] == expected[1:]):
                raise UserError(
                    f"checkpoint {self.path} holds {key} as {actual}, the configuration says "
                    f"{expected}: give the config.json it was trained with",
                    key="checkpoint",
                    cause=Cause.CONFLICT,
                )
