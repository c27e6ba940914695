"""The weights in a Hugging Face folder, plain or FP8, read rectangle by rectangle."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from torch import Tensor

from megatron_r1.errors import UserError
from megatron_r1.weights.layout import Shape, hf_tensors, table
from megatron_r1.weights.stored import fp8, fp8_blocks
from megatron_r1.weights.stored.safetensors_file import SafetensorsFile
from megatron_r1.weights.stored.weight_files import weight_files

FLOATS = {
    "F32": "float32",
    "BF16": "bfloat16",
    "F16": "float16",
    "F8_E4M3": fp8.STORED,
}
# Named so, a checkpoint may hold what no table lists: tied heads, and what older transformers
# stored.
_IGNORED = ("lm_head.weight", ".rotary_emb.inv_freq")


class HfWeights:
    """The tensors of the safetensors checkpoint in `folder`, which has the configuration `hf`.

    Reads `model.safetensors.index.json` and its files, or one `model.safetensors`. Raises
    ValueError for missing and damaged files at once; `check` compares names and shapes with `hf`.
    """

    def __init__(self, folder: str | Path, hf: dict):
        self.path, self.hf = Path(folder), hf
        self.files = [SafetensorsFile(file) for file in weight_files(self.path)]
        self._home = {name: file for file in self.files for name in file.tensors}
        self.copies = table(hf).copies

    def __enter__(self) -> HfWeights:
        return self

    def __exit__(self, *exception) -> None:
        for file in self.files:
            file.close()

    @cached_property
    def tensors(self) -> dict[str, tuple[Shape, str]]:
        """name -> (shape, stored dtype), without scales and what no table lists."""
        known = hf_tensors(self.hf)
        found = {}
        for name, file in self._home.items():
            stored = file.tensors[name]
            if name in known:
                found[name] = (stored.shape, FLOATS.get(stored.dtype, stored.dtype))
        return found

    def read(self, name: str, dim: int, start: int, length: int) -> Tensor:
        """`length` rows (dim 0) or columns (dim 1), in the stored dtype; of FP8, the fp32 values.

        A copy that the table knows of, and the folder does not hold, is read from its original.
        """
        name = self._found(name)
        starts, sizes = self._box(name, dim, start, length)
        file = self._home[name]
        if file.tensors[name].dtype != "F8_E4M3":
            return file.read(name, starts, sizes)
        # Whole blocks around the rectangle, which may begin and end inside of some.
        shape = file.tensors[name].shape
        first = tuple(s // fp8.BLOCK for s in starts)
        last = tuple(-(-(s + n) // fp8.BLOCK) for s, n in zip(starts, sizes, strict=True))
        outer = tuple(f * fp8.BLOCK for f in first)
        ends = tuple(min(x * fp8.BLOCK, full) for x, full in zip(last, shape, strict=True))
        q = file.read(name, outer, tuple(e - o for e, o in zip(ends, outer, strict=True)))
        blocks = tuple(x - f for x, f in zip(last, first, strict=True))
        scales = self.read_stored(fp8.scale_name(name), first, blocks)
        values = fp8_blocks.dequantise(q, scales)
        for axis, (outside, inside, size) in enumerate(zip(outer, starts, sizes, strict=True)):
            values = values.narrow(axis, inside - outside, size)
        return values

    def read_stored(self, name: str, starts: Shape, sizes: Shape) -> Tensor:
        """A rectangle as it is stored: of FP8 weights the codes, and also of their scales."""
        return self._home[name].read(name, starts, sizes)

    def scales(self, name: str) -> Tensor | None:
        """All scales of an FP8 tensor; None of another."""
        stored = self._home.get(fp8.scale_name(name))
        if stored is None:
            return None
        shape = stored.tensors[fp8.scale_name(name)].shape
        return self.read_stored(fp8.scale_name(name), (0,) * len(shape), shape)

    def check(self, with_mtp: bool) -> None:
        """Raise UserError naming every missing, unexpected or mis-shaped tensor."""
        hf = self.hf
        known = hf_tensors(hf)
        needed = hf_tensors(hf, with_mtp=with_mtp).keys() - self.copies.keys()
        missing = sorted(needed - self._home.keys())
        scales = set()
        wrong = []
        for name in sorted(needed & self._home.keys()):
            stored = self._home[name].tensors[name]
            if stored.shape != known[name][0]:
                wrong.append(f"{name} is {stored.shape}, config.json says {known[name][0]}")
            elif stored.dtype not in FLOATS:
                wrong.append(f"{name} is {stored.dtype}, only {', '.join(FLOATS)} can be read")
            elif stored.dtype == "F8_E4M3":
                scales.add(fp8.scale_name(name))
                wrong += self._wrong_scales(name, stored.shape)
        if scales:
            fp8.check_config(hf)
        missing += sorted(scales - self._home.keys())
        extra = [n for n in self._home.keys() - known.keys() if not n.endswith(_IGNORED)]
        extra = sorted(n for n in extra if n.removesuffix("_scale_inv") not in known)
        problems = [
            f"{label} ({len(names)}): {_some(names)}"
            for label, names in (("missing", missing), ("unexpected", extra), ("wrong", wrong))
            if names
        ]
        if problems:
            raise UserError(
                f"checkpoint {self.path} does not fit its config.json: {'; '.join(problems)}"
                + _hint(missing, hf)
            )

    def _wrong_scales(self, name: str, shape: Shape) -> list[str]:
        scale = fp8.scale_name(name)
        if scale not in self._home:
            return []
        stored = self._home[scale].tensors[scale]
        if (stored.dtype, stored.shape) == ("F32", fp8.scale_shape(shape)):
            return []
        return [f"{scale} is {stored.dtype} {stored.shape}, not F32 {fp8.scale_shape(shape)}"]

    def _found(self, name: str) -> str:
        return name if name in self._home else self.copies.get(name, name)

    def _box(self, name: str, dim: int, start: int, length: int) -> tuple[Shape, Shape]:
        sizes = list(self._home[name].tensors[name].shape)
        starts = [0] * len(sizes)
        starts[dim], sizes[dim] = start, length
        return tuple(starts), tuple(sizes)


def _hint(missing: list[str], hf: dict) -> str:
    mtp = str(hf["num_hidden_layers"])
    if any(name.split(".layers.")[-1].split(".")[0] == mtp for name in missing):
        return "; leave the MTP layers out (model.mtp: none) if the checkpoint has none"
    return ""


def _some(names: list[str], most: int = 8) -> str:
    rest = f" … and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
