"""The scales that a published FP8 checkpoint is stored with, as fp32."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_r1.base.files.untrusted_files import require_inside
from megatron_r1.base.files.weight_files import SINGLE_FILE, read_index
from megatron_r1.models.hf_config import HFConfig
from megatron_r1.models.weights.formats import published_layout
from megatron_r1.models.weights.formats.tensor_files import SafetensorsFile

SCALES_FILE = "fp8_scales.safetensors"
"""The file of a converted checkpoint with the FP8 scales that its weights were dequantized with."""


class KnownScales:
    """The `weight_scale_inv` tensors of a published FP8 checkpoint, or of a SCALES_FILE."""

    def __init__(self, folder: str | Path, hf_config: HFConfig):
        self._home: dict[str, SafetensorsFile] = {}
        for path in _files_with_scales(Path(folder)):
            file = SafetensorsFile(path)
            self._home |= {name: file for name in file.tensors if published_layout.is_scale(name)}
        self.power_of_two = published_layout.has_power_of_two_scales(hf_config)

    def rows(self, name: str, first: int, count: int) -> Tensor | None:
        """Return the scales of rows [first, first + count) of the weight `name`, or None.

        Args:
            name: the weight's name.
            first: row.
            count: the number of rows.
        """
        scale = published_layout.scale_name(name)
        if scale not in self._home:
            return None
        start = first // published_layout.FP8_BLOCK_SIZE
        end = -(-(first + count) // published_layout.FP8_BLOCK_SIZE)
        columns = self._home[scale].tensors[scale].shape[1]
        return read_scales(self._home[scale], scale, (start, 0), (end - start, columns))


def read_scales(
    file: SafetensorsFile, name: str, starts: Sequence[int], sizes: Sequence[int]
) -> Tensor:
    """Return a rectangle of stored scales as their values, fp32.

    Args:
        file: the file that has them.
        name: the scales' name in it.
        starts: first index along each dimension.
        sizes: the shape of the rectangle."""
    stored_scales = file.read(name, starts, sizes)
    if stored_scales.dtype == torch.uint8:
        stored_scales = stored_scales.view(torch.float8_e8m0fnu)
    return stored_scales.float()


def _files_with_scales(folder: Path) -> list[Path]:
    if (folder / SCALES_FILE).is_file():
        return [folder / SCALES_FILE]
    if (file_of_tensor := read_index(folder)) is not None:
        # A checkpoint whose weights are elsewhere may still give its configuration.
        names = sorted(
            {file for name, file in file_of_tensor.items() if published_layout.is_scale(name)}
        )
        paths = [folder / name for name in names if (folder / name).is_file()]
        for path in paths:
            require_inside(path, folder, "weights")
        return paths
    return [path for path in [folder / SINGLE_FILE] if path.is_file()]
