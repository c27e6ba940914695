"""The compiled cases: every kernel of r1_kernels.fused, in the specialisations of real runs.

Sizes are those of DeepSeek-V3's output layer, 129,280 columns or an eighth, and of one of its
weights; tensors are on PyTorch's meta device and take no memory.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from r1_kernels import fused
from r1_kernels.policy_terms import PolicySettings, TokenTensors
from r1_kernels.vocabulary import RowUpstream, Shard
from torch import Tensor

TOKENS = 65_536
VOCAB = 129_280
EIGHTH = VOCAB // 8
WEIGHT = (18_432, 7_168)
SEQUENCES = 64
POLICIES = (
    "",
    "reference",
    "reference, rollout",
    "reference, rollout, dual clip, sequence",
    "reference, rollout, cispo",
)

BF16, FP32 = torch.bfloat16, torch.float32
NAMES = {BF16: "bf16", FP32: "fp32"}


class Case(NamedTuple):
    """One kernel launch whose resources are examined. least_bytes: bytes per element that the
    algorithm must move; elements: of the whole launch, used for kernels without a loop."""

    name: str
    launcher: Callable[[], object]
    least_bytes: float
    elements: int


def cases() -> list[Case]:
    return [*_softmax(), *_policies(), *_quantisation()]


def _softmax() -> Iterator[Case]:
    for name, dtype, columns, real in (
        ("bf16", BF16, VOCAB, VOCAB),
        ("fp32", FP32, VOCAB, VOCAB),
        ("bf16, an eighth", BF16, EIGHTH, EIGHTH),
        # A last id that is no multiple of 16 must not cost the whole loop its wide loads.
        ("bf16, padded", BF16, VOCAB, VOCAB - 1),
    ):
        launcher = partial(_row_statistics, dtype, columns, real)
        yield Case(f"row_statistics {name}", launcher, dtype.itemsize, TOKENS * columns)
    for dtype, out in ((BF16, BF16), (FP32, BF16), (FP32, FP32)):
        for more in ("", ", entropy", *([", padded"] if out == dtype == BF16 else [])):
            name = f"logits_gradient {NAMES[dtype]} to {NAMES[out]}{more}"
            launcher = partial(_logits_gradient, dtype, out, more)
            yield Case(name, launcher, dtype.itemsize + out.itemsize, TOKENS * VOCAB)


def _policies() -> Iterator[Case]:
    for present in POLICIES:
        # Always read: log-probabilities, old ones, advantages, weights. Written: six numbers.
        inputs = 4 + sum(name in present for name in ("reference", "rollout", "sequence"))
        name = f"policy_terms {present}".strip()
        yield Case(name, partial(_policy, present), 4 * inputs + 24, TOKENS)
    yield Case("segment_sums", _segments, 4, TOKENS)


def _quantisation() -> Iterator[Case]:
    for rows in (128, 1):
        block = (rows, 128)
        num_bytes = 2 + 1 + 4 / (rows * 128)
        weights = WEIGHT[0] * WEIGHT[1]
        for name, launcher in (("quantize", _quantize), ("dequantize", _dequantize)):
            yield Case(f"{name} {rows}x128 bf16", partial(launcher, block), num_bytes, weights)


def _meta(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _targets() -> Tensor:
    return _meta(TOKENS, dtype=torch.int64)


def _row_statistics(dtype: torch.dtype, columns: int, real: int) -> None:
    shard = Shard(0, columns, real, VOCAB, None)
    fused.row_statistics(_meta(TOKENS, columns, dtype=dtype), _targets(), shard, 1.0)


def _logits_gradient(dtype: torch.dtype, out: torch.dtype, more: str) -> None:
    logits = _meta(TOKENS, VOCAB, dtype=dtype)
    shard = Shard(0, VOCAB, VOCAB - ("padded" in more), VOCAB, None)
    rows = [_meta(TOKENS) for _ in range(5)]
    upstream = RowUpstream(*rows[:4], rows[4] if "entropy" in more else None)
    target = logits if out == dtype else torch.empty_like(logits, dtype=out)
    fused.logits_gradient(logits, _targets(), shard, 1.0, upstream, target)


def _policy(present: str) -> None:
    def given(name: str) -> Tensor | None:
        return _meta(TOKENS) if name in present else None

    always = {k: _meta(TOKENS) for k in ("logprobs", "old_logprobs", "advantages", "weights")}
    tokens = TokenTensors(
        **always,
        ref_logprobs=given("reference"),
        rollout_logprobs=given("rollout"),
        log_ratio=given("sequence"),
    )
    dual_clip = 3.0 if "dual clip" in present else None
    objective = "cispo" if "cispo" in present else "ppo"
    fused.policy_terms(tokens, PolicySettings(0.2, 0.2, dual_clip, 0.001, "k3", 2.0, objective))


def _segments() -> None:
    fused.segment_sums(_meta(TOKENS), _meta(SEQUENCES + 1, dtype=torch.int32))


def _quantize(block: tuple[int, int]) -> None:
    fused.quantize_blocks(_meta(*WEIGHT, dtype=BF16), block)


def _dequantize(block: tuple[int, int]) -> None:
    codes = _meta(*WEIGHT, dtype=torch.float8_e4m3fn)
    scales = _meta(WEIGHT[0] // block[0], WEIGHT[1] // block[1])
    fused.dequantize_blocks(codes, scales, block, BF16)
