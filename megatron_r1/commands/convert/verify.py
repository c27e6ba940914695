"""Compares two models of either kind, tensor by tensor."""

from argparse import Namespace
from collections import Counter
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_r1.commands.convert import conversion_parts
from megatron_r1.commands.convert.sources import (
    Weights,
    check_manifest,
    find_checkpoint,
    is_hf,
    open_weights,
)
from megatron_r1.models.weights.formats import published_layout, quantized_blocks
from megatron_r1.models.weights.formats.hf_folder import HFWeights
from megatron_r1.models.weights.formats.tensor_files import as_bytes
from megatron_r1.reporting.formatting import format_count

MAX_SHOWN = 20
# From exact to coarse: two dtypes are compared in the later one.
_ORDER = ("float64", "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class ModelPair:
    """The two models to compare.

    Attributes:
        a: the first model's folder.
        b: the second model's folder.
        config: the folder with a checkpoint's config.json."""

    a: Path
    b: Path
    config: Path | None


@dataclass(frozen=True)
class TensorDifference:
    """One tensor's number of elements with other bits, its largest |a - b| and where that is."""

    name: str
    count: int
    max_difference: float
    where: tuple[int, ...]


def run(args: Namespace) -> int:
    """Print the differences; return 0 if there are none, else 1."""
    config = args.config or next((side for side in (args.a, args.b) if is_hf(side)), None)
    sides = ModelPair(_model_folder(args.a, args), _model_folder(args.b, args), config)
    with open_weights(sides.a, config) as a, open_weights(sides.b, config) as b:
        names, missing, reshaped = _sort_names(a, b)
        explained = _explain_dtypes(a, b, names)
    differing = compare_tensors(sides, names, args.workers)
    for text in (*missing, *reshaped):
        print(text)
    for difference in sorted(differing, key=lambda d: -d.max_difference)[:MAX_SHOWN]:
        location = f" at {list(difference.where)}" if difference.where else ""
        verb = "differs" if difference.count == 1 else "differ"
        differ = f"{format_count(difference.count, 'element')} {verb}"
        print(f"{difference.name}: {differ}, max |Δ| {difference.max_difference:.6g}{location}")
    if len(differing) > MAX_SHOWN:
        print(f"… and {len(differing) - MAX_SHOWN} more tensors that differ less")
    for text in explained:
        print(text)
    total = len(names) + len(missing) + len(reshaped)
    print(f"{len(names) - len(differing)} of {total} tensors equal")
    return 0 if not (missing or reshaped or differing) else 1


def _model_folder(path: Path, args: Namespace) -> Path:
    """Return the folder of the model at `path`: for a run its newest checkpoint, undamaged.

    A checkpoint that the command names itself is compared as it is."""
    if is_hf(path):
        return path
    checkpoint = find_checkpoint(path)
    if checkpoint.run is not None:
        check_manifest(checkpoint, "full", args)
    return checkpoint.folder


def _sort_names(a: Weights, b: Weights) -> tuple[list[str], list[str], list[str]]:
    """Return (names in both, missing tensors, other shapes), the last two in words."""
    common_names, missing, reshaped = [], [], []
    for name in [*a.tensors, *(n for n in b.tensors if n not in a.tensors)]:
        lacking = [s for s in (a, b) if not {name, s.duplicate_of.get(name)} & s.tensors.keys()]
        if lacking:
            missing.append(f"{name}: only in one, {lacking[0].path} lacks it")
            continue
        first, second = (_shape_and_dtype(side, name)[0] for side in (a, b))
        if first != second:
            reshaped.append(f"{name}: {first} in A, {second} in B")
        else:
            common_names.append(name)
    return common_names, missing, reshaped


def _explain_dtypes(a: Weights, b: Weights, names: list[str]) -> list[str]:
    """Return a line for each pair of different dtypes: how they were compared."""
    pairs = Counter((_shape_and_dtype(a, name)[1], _shape_and_dtype(b, name)[1]) for name in names)
    lines = []
    for (first, second), count in pairs.items():
        if first == second:
            continue
        coarser = str(_common_dtype(first, second)).removeprefix("torch.")
        method = f"compared after rounding to {coarser}"
        if published_layout.FP8_DTYPE in (first, second):
            method = "compared within FP8's rounding (half a step)"
        lines.append(f"{count} tensors are {first} in A and {second} in B: {method}")
    return lines


def compare_tensors(sides: ModelPair, names: list[str], workers: int) -> list[TensorDifference]:
    """Return the tensors of `names` whose values differ.

    Args:
        sides: the two models.
        names: the tensors that both have, in equal shapes.
        workers: processes that compare."""
    step = max(1, len(names) // (workers * 64))
    batches = [names[first : first + step] for first in range(0, len(names), step)]
    differences = conversion_parts.run_parts(
        partial(_compare_batch, sides), batches, workers, "batch"
    )
    return [difference for batch in differences for difference in batch]


@cache
def _open_both(sides: ModelPair) -> tuple[Weights, Weights]:
    return open_weights(sides.a, sides.config), open_weights(sides.b, sides.config)


def _compare_batch(sides: ModelPair, names: list[str]) -> list[TensorDifference]:
    return [difference for name in names if (difference := _compare_tensor(sides, name))]


def _compare_tensor(sides: ModelPair, name: str) -> TensorDifference | None:
    pair = _open_both(sides)
    (shape, a), (_, b) = (_shape_and_dtype(side, name) for side in pair)
    dtype = _common_dtype(a, b)
    lossy = (a == published_layout.FP8_DTYPE) != (b == published_layout.FP8_DTYPE)
    count, largest = 0, -1.0
    location: tuple[int, ...] = ()
    for first, rows in conversion_parts.row_stripes(shape, published_layout.FP8_BLOCK_SIZE):
        x, y = (side.read(name, 0, first, rows) for side in pair)
        if lossy:
            unequal = _beyond_rounding(pair, name, first, x.float(), y.float())
        else:
            x, y = x.to(dtype), y.to(dtype)
            unequal = _other_bits(x, y)
        if not unequal.any():
            continue
        gaps = (x.double() - y.double()).abs().nan_to_num(torch.inf, torch.inf)
        gaps = torch.where(unequal, gaps, -1.0)
        place = int(gaps.argmax())
        if gaps.flatten()[place] > largest:
            largest = float(gaps.flatten()[place])
            index = [int(i) for i in torch.unravel_index(torch.tensor(place), gaps.shape)]
            location = (index[0] + first, *index[1:])
        count += int(unequal.sum())
    if not count and not lossy and _scales_differ(*pair, name):
        return TensorDifference(published_layout.scale_name(name), 1, 0.0, ())
    return TensorDifference(name, count, largest, location) if count else None


def _shape_and_dtype(weights: Weights, name: str) -> tuple[tuple[int, ...], str]:
    """Return (shape, stored dtype) of a tensor, which may be stored as another."""
    return weights.tensors.get(name) or weights.tensors[weights.duplicate_of[name]]


def _common_dtype(a: str, b: str) -> torch.dtype:
    """Return the dtype for the comparison of two stored ones: the coarser; FP8 counts as fp32."""
    dtypes = ["float32" if name == published_layout.FP8_DTYPE else name for name in (a, b)]
    return getattr(torch, max(dtypes, key=_ORDER.index))


def _other_bits(a: Tensor, b: Tensor) -> Tensor:
    """Compare bits elementwise, so that NaN equals itself and -0 is not 0."""
    different = as_bytes(a.contiguous()) != as_bytes(b.contiguous())
    return different.view(-1, a.itemsize).any(1).view(a.shape)


def _beyond_rounding(
    pair: tuple[Weights, Weights], name: str, first: int, x: Tensor, y: Tensor
) -> Tensor:
    """Return elementwise whether FP8 values differ from plain ones by more than a rounding.

    Half the distance between two e4m3 numbers is at most 2^-4 of them, for the smallest 2^-10 of
    the scale. NaN counts as beyond.

    Args:
        pair: the two models. One of them is quantized.
        name: the tensor's name.
        first: the first row of `x` and `y` in the tensor.
        x: rows of the first model's tensor.
        y: the same rows of the second's."""
    quantized = (s for s in pair if _shape_and_dtype(s, name)[1] == published_layout.FP8_DTYPE)
    quantized_side = next(quantized)
    scales = quantized_side.scales(name) if isinstance(quantized_side, HFWeights) else None
    assert scales is not None, f"{quantized_side.path}: {name} is FP8 without scales"
    plain_values = x if quantized_side is pair[1] else y
    rows = slice(
        first // published_layout.FP8_BLOCK_SIZE,
        -(-(first + len(x)) // published_layout.FP8_BLOCK_SIZE),
    )
    scale = quantized_blocks.spread_scales(scales[rows], x.shape)
    allowed = torch.maximum(plain_values.abs() * 2**-4, scale * 2**-10)
    # The scale itself is rounded, and the plain values may have been rounded to bf16.
    return ~((x - y).abs() <= allowed * (1 + 2**-7))


def _scales_differ(a: Weights, b: Weights, name: str) -> bool:
    """Return whether the scales differ; blocks of zeros have equal values with any scale."""
    if not (isinstance(a, HFWeights) and isinstance(b, HFWeights)):
        return False
    first, second = a.scales(name), b.scales(name)
    return first is not None and second is not None and not torch.equal(first, second)
