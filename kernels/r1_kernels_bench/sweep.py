"""Times block sizes and warps of the Triton kernels on this GPU, and names the fastest.

`python tools/bench kernels --sweep`. PLAN has the values of every constant that is tried; all
combinations of one entry are timed in turns on launches of `r1_kernels.examples`, at the sizes of
DeepSeek-V3's output layer. That each gives what plain PyTorch gives is tested
(tests/kernels/test_sweep.py), so only times decide here.

Stages are no constant of these kernels: Triton pipelines loops whose loads feed a matrix product,
and these have none. With 1 to 4 stages they compile to the same instructions
(tests/kernels/test_sweep.py)."""

import argparse
import contextlib
import importlib
import itertools
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple
from unittest import mock

import torch
from r1_kernels.examples import ExampleLaunch, ExampleSizes, example_launches
from r1_kernels.registry import KERNELS, load_primitives

from r1_kernels_bench.measure import CUDAMeter

SUMMARY = "median of rounds that take every candidate in turn"
Values = Mapping[str, int]


class Choices(NamedTuple):
    """The constants of one kernel that decide together.

    Attributes:
        kernel: the primitive's name in `registry.KERNELS`.
        values: what is tried of each constant.
        launches: names of launches in `r1_kernels.examples`.
        table: the dictionary that holds the constants and its key; empty: the module itself.
        more_columns: columns beyond `--vocab`; one makes rows begin at odd addresses."""

    kernel: str
    values: Mapping[str, Sequence[int]]
    launches: tuple[str, ...]
    table: tuple[Any, ...] = ()
    more_columns: int = 0

    @property
    def candidates(self) -> list[dict[str, int]]:
        """Every combination of the values."""
        combinations = itertools.product(*self.values.values())
        return [dict(zip(self.values, combination, strict=True)) for combination in combinations]

    @property
    def module(self) -> Any:
        """The module that holds the constants, imported."""
        return importlib.import_module(f"r1_kernels.primitives.{self.stem}_triton")

    @property
    def stem(self) -> str:
        """Its file is kernels/r1_kernels/primitives/<stem>_triton.py."""
        return next(kernel.stem for kernel in KERNELS if kernel.name == self.kernel)

    @property
    def place(self) -> str:
        """Where the constants are, for a reader who wants to change them."""
        location = "{}[{}] in ".format(*self.table) if len(self.table) == 2 else ""
        location = f"{self.table[0]} in " if len(self.table) == 1 else location
        return f"{location}kernels/r1_kernels/primitives/{self.stem}_triton.py"

    @property
    def present_values(self) -> dict[str, int]:
        """The present values."""
        constants = self._swept_constants()
        return {name: constants[name] for name in self.values}

    def _swept_constants(self) -> dict[str, Any]:
        if not self.table:
            return vars(self.module)
        constants = getattr(self.module, self.table[0])
        return constants[self.table[1]] if len(self.table) == 2 else constants

    @contextlib.contextmanager
    def apply(self, values: Values) -> Iterator[None]:
        """Launch with these values within the block."""
        new_values: dict[str, Any] = dict(values)
        table_patch = mock.patch.dict(self._swept_constants(), values) if self.table else None
        with table_patch or mock.patch.multiple(self.module, **new_values):
            yield


PLAN = (
    Choices(
        "row_statistics",
        {"LOADS": (2, 4, 8), "MAX_LANES": (128, 256, 512)},
        ("row_statistics bf16", "row_statistics fp32"),
    ),
    Choices(
        "row_statistics",
        {"NARROW_LOADS": (4, 8, 16), "MAX_LANES": (128, 256, 512)},
        ("row_statistics bf16", "row_statistics fp32"),
        more_columns=1,
    ),
    Choices(
        "logits_gradient",
        {"GRADIENT_BLOCK": (2048, 4096, 8192), "NUM_WARPS": (4, 8, 16)},
        ("logits_gradient bf16 to bf16", "logits_gradient fp32 to fp32"),
    ),
    Choices(
        "kept_statistics",
        {"LOADS": (2, 4, 8)},
        ("kept_statistics bf16", "kept_statistics fp32"),
    ),
    Choices(
        "kept_gradient",
        {"GRADIENT_IDS": (32, 64, 128)},
        ("kept_gradient bf16", "kept_gradient fp32"),
    ),
    Choices(
        "kept_scatter",
        {"SCATTER_BLOCK": (2048, 4096, 8192), "SCATTER_IDS": (64, 128), "SCATTER_WARPS": (2, 4, 8)},
        ("kept_scatter bf16", "kept_scatter fp32"),
    ),
    Choices(
        "policy_terms",
        {"TOKENS_PER_BLOCK": (256, 512, 1024), "NUM_WARPS": (2, 4, 8)},
        ("policy_terms reference", "policy_terms reference, rollout"),
    ),
    Choices(
        "segment_sums",
        {"SUM_BLOCK": (1024, 2048, 4096), "SUM_WARPS": (4, 8, 16)},
        ("segment_sums",),
    ),
    Choices(
        "quantize_blocks",
        {"num_warps": (8, 16, 32)},
        ("quantize 128x128 bf16",),
        table=("QUANTIZE", 128),
    ),
    Choices(
        "quantize_blocks",
        {"TILE_ROWS": (16, 32, 64), "num_warps": (4, 8)},
        ("quantize 1x128 bf16",),
        table=("QUANTIZE", 1),
    ),
    Choices(
        "dequantize_blocks",
        {"TILE_ROWS": (16, 32, 64), "num_warps": (4, 8)},
        ("dequantize 128x128 bf16", "dequantize 1x128 bf16"),
        table=("DEQUANTIZE",),
    ),
)


def refusal(options: argparse.Namespace) -> str:
    """Return why this machine or these options allow no sweep, or ""."""
    if not torch.cuda.is_available():
        return (
            "--sweep needs an NVIDIA GPU, and torch.cuda.is_available() is False here: it times "
            "compiled Triton kernels. Run it on a machine with one (make setup-cuda); what they "
            "compile to shows `python tools/bench resources` without one"
        )
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "--sweep: TRITON_INTERPRET=1 compiles no kernel; unset it, start again"
    for option in ("preset", "hidden", "dtype", "tp", "plot"):
        if getattr(options, option) is not None:
            return f"--{option} does not go with --sweep: its sizes are --tokens and --vocab"
    kernel_names = {choices.kernel for choices in PLAN}
    for name in options.only or []:
        if name not in kernel_names:
            return f"--only {name}: the kernels of --sweep are {', '.join(sorted(kernel_names))}"
    return ""


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return an entry for each part of PLAN: every candidate's seconds and the best.

    Args:
        options: the options of `python tools/bench kernels`, which `refusal` has accepted."""
    deadline = time.time() + 60 * options.minutes
    meter = CUDAMeter(torch.device("cuda"))
    defaults = ExampleSizes()
    sizes = defaults._replace(
        num_tokens=options.tokens or defaults.num_tokens,
        vocab_size=options.vocab or defaults.vocab_size,
    )
    entries = []
    for choices in PLAN:
        if options.only and choices.kernel not in options.only:
            continue
        if time.time() > deadline:
            print(f"{choices.kernel}: not begun within --minutes {options.minutes:g}")
            continue
        entries.append(measure(choices, sizes, meter, options.repeats or 5))
        print("\n".join(lines(entries[-1])), flush=True)
    return entries


def measure(
    choices: Choices, sizes: ExampleSizes, meter: Any, repeats: int, device: str = "cuda"
) -> dict[str, Any]:
    """Return the entry of one part of the plan; `seconds` of a row by launch are medians.

    Args:
        choices: the part of the plan.
        sizes: tokens and vocabulary, to which `choices.more_columns` are added.
        meter: a `CUDAMeter`, which returns a call's seconds.
        repeats: timed rounds, after one of warm-up.
        device: where the launches' tensors are."""
    sizes = sizes._replace(vocab_size=sizes.vocab_size + choices.more_columns)
    kernel = next(kernel for kernel in KERNELS if kernel.name == choices.kernel)
    rows: list[dict[str, Any]] = [{"values": v, "seconds": {}} for v in choices.candidates]
    failures: dict[str, str] = {}
    examples = example_launches(kernel, sizes, device)
    while True:
        try:
            example = next(examples, None)
        except torch.OutOfMemoryError as error:  # a generator that raised is at its end
            failures["the other launches"] = str(error).splitlines()[0]
            break
        if example is None:
            break
        if example.name in choices.launches:
            for row, seconds in zip(
                rows, _candidate_seconds(choices, example, meter, repeats), strict=True
            ):
                row["seconds"][example.name] = seconds
        del example
        meter.settle()
    return {
        "kernel": choices.kernel,
        "constants_in": choices.place,
        "columns": sizes.vocab_size,
        "in_use": choices.present_values,
        "rows": rows,
        "failed": failures,
        **best(rows, choices.present_values),
    }


def _candidate_seconds(
    choices: Choices, example: ExampleLaunch, meter: Any, repeats: int
) -> list[float]:
    """Return each candidate's median seconds; a round times each once, after one of warm-up."""
    call = getattr(load_primitives("triton"), choices.kernel)
    times: list[list[float]] = [[] for _ in choices.candidates]
    for turn in range(repeats + 1):
        for values, timings in zip(choices.candidates, times, strict=True):
            with choices.apply(values):
                seconds = meter(lambda: call(*example.arguments)).seconds
            if turn:
                timings.append(seconds)
    return [median(timings) for timings in times]


def best(rows: Sequence[Mapping[str, Any]], in_use: Values) -> dict[str, Any]:
    """Return the values with the least time, and their time in that of the values in use: the
    geometric mean over launches. Nothing where no launch was timed."""
    base = next(row["seconds"] for row in rows if row["values"] == in_use)
    if not base:
        return {"best": None, "best_time": None}

    def relative(row: Mapping[str, Any]) -> float:
        return math.prod(row["seconds"][n] / base[n] for n in base) ** (1 / len(base))

    best_row = min(rows, key=relative)
    return {"best": best_row["values"], "best_time": relative(best_row)}


def lines(entry: Mapping[str, Any]) -> list[str]:
    """Return one part of the plan as a table: microseconds of each candidate and launch."""
    timed_names = list(entry["rows"][0]["seconds"])
    table = [f"\n{entry['kernel']}, {entry['columns']} columns: {entry['constants_in']}"]
    table += [f"  not timed: {name}: {reason}" for name, reason in entry["failed"].items()]
    if not timed_names:
        return table
    table.append(f"  {'microseconds':34}" + "".join(f" {name:>30}" for name in timed_names))
    for row in entry["rows"]:
        mark = " *" if row["values"] == entry["in_use"] else ""
        cells = "".join(f" {row['seconds'][name] * 1e6:30.1f}" for name in timed_names)
        table.append(f"  {_values_text(row['values']) + mark:34}{cells}")
    table.append(
        f"  best: {_values_text(entry['best'])}, {entry['best_time']:.2f} of the time of those in "
        "use (*)"
    )
    return table


def _values_text(values: Values) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
