"""FP8 scales that a checkpoint's weights may once have been read with."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from megatron_r1.weights.stored import fp8
from megatron_r1.weights.stored.safetensors_file import SafetensorsFile
from megatron_r1.weights.stored.weight_files import INDEX, SINGLE

FILE = "fp8_scales.safetensors"
"""In a converted checkpoint: the scales alone, 1/4096 of the FP8 weights' bytes."""


class KnownScales:
    """The `weight_scale_inv` tensors in a folder: the published FP8 checkpoint, or FILE alone."""

    def __init__(self, folder: str | Path, hf: dict):
        self._home: dict[str, SafetensorsFile] = {}
        for path in _files(Path(folder)):
            file = SafetensorsFile(path)
            self._home |= {name: file for name in file.tensors if fp8.is_scale(name)}
        quantisation = hf.get("quantization_config") or {}
        self.power_of_two = quantisation.get("scale_fmt") == "ue8m0"

    def rows(self, name: str, first: int, count: int) -> Tensor | None:
        """The scales of rows [first, first + count) of the weight `name`, whole blocks; or None."""
        scale = fp8.scale_name(name)
        if scale not in self._home:
            return None
        start, end = first // fp8.BLOCK, -(-(first + count) // fp8.BLOCK)
        columns = self._home[scale].tensors[scale].shape[1]
        return self._home[scale].read(scale, (start, 0), (end - start, columns))


def _files(folder: Path) -> list[Path]:
    if (folder / FILE).is_file():
        return [folder / FILE]
    index = folder / INDEX
    if index.is_file():
        placed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        # A checkpoint whose weights are elsewhere may still give its configuration.
        names = sorted({file for name, file in placed.items() if fp8.is_scale(name)})
        return [folder / name for name in names if (folder / name).is_file()]
    return [path for path in [folder / SINGLE] if path.is_file()]
