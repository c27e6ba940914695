"""The purpose of each kernel, and its launches in real runs: read by the tests, by the tables of
`tools/bench kernels`, by the ahead-of-time compilation of `tools/bench resources` and for README's
table. No computation imports this file.

The examples are those launches in each specialization that compiles to other code. Their sizes are
those of DeepSeek-V3's output layer and of one of its weights, unless the caller gives smaller ones;
on PyTorch's meta device they take no memory."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from r1_kernels.policy_terms import PolicySettings, TokenTensors
from r1_kernels.registry import STEMS
from r1_kernels.vocabulary import RowUpstream, Shard

BF16, FP32 = torch.bfloat16, torch.float32
POLICIES = (
    "",
    "reference",
    "reference, rollout",
    "reference, rollout, dual clip, sequence",
    "reference, rollout, cispo",
)


class Sizes(NamedTuple):
    """T tokens in packed sequences, V ids of the vocabulary, (M, N) of a weight."""

    tokens: int = 65_536
    vocab: int = 129_280
    weight: tuple[int, int] = (18_432, 7_168)
    sequences: int = 64


class Example(NamedTuple):
    """One launch. arguments: of the primitive. least_bytes: bytes per element that any
    implementation must move; elements: of the whole launch."""

    name: str
    arguments: tuple[Any, ...]
    least_bytes: float
    elements: int


class Kernel(NamedTuple):
    """The facts about the primitive `name` beside its code.

    computes, num_bytes: for README; bytes read → written, b being those of an input element.
    examples: its launches on a device. measured_in: the table of `tools/bench kernels` that
    includes it; without one it gets its own."""

    name: str
    computes: str
    num_bytes: str
    examples: Callable[[Sizes, str], Iterator[Example]]
    measured_in: str = ""

    @property
    def stem(self) -> str:
        """The start of its files' names in primitives/."""
        return STEMS[self.name]


def _row_statistics(sizes: Sizes, device: str) -> Iterator[Example]:
    tokens, vocab = sizes.tokens, sizes.vocab
    for name, dtype, columns, real in (
        ("bf16", BF16, vocab, vocab),
        ("fp32", FP32, vocab, vocab),
        ("bf16, an eighth", BF16, vocab // 8, vocab // 8),
        # A last id that is no multiple of 16 must not cost the whole loop its wide loads.
        ("bf16, padded", BF16, vocab, vocab - 1),
    ):
        logits = torch.randn(tokens, columns, dtype=dtype, device=device)
        arguments = logits, _targets(sizes, device), Shard(0, columns, real, vocab, None), 1.0
        yield Example(f"row_statistics {name}", arguments, dtype.itemsize, logits.numel())


def _logits_gradient(sizes: Sizes, device: str) -> Iterator[Example]:
    names = {BF16: "bf16", FP32: "fp32"}
    for dtype, out in ((BF16, BF16), (FP32, BF16), (FP32, FP32)):
        for more in ("", ", entropy", *([", padded"] if out == dtype == BF16 else [])):
            logits = torch.randn(sizes.tokens, sizes.vocab, dtype=dtype, device=device)
            rows = torch.randn(5, sizes.tokens, device=device).unbind()
            upstream = RowUpstream._make([*rows[:4], rows[4] if "entropy" in more else None])
            shard = Shard(0, sizes.vocab, sizes.vocab - ("padded" in more), sizes.vocab, None)
            target = logits if out == dtype else torch.empty_like(logits, dtype=out)
            arguments = logits, _targets(sizes, device), shard, 1.0, upstream, target
            name = f"logits_gradient {names[dtype]} to {names[out]}{more}"
            yield Example(name, arguments, dtype.itemsize + out.itemsize, logits.numel())


def _policy_terms(sizes: Sizes, device: str) -> Iterator[Example]:
    for present in POLICIES:
        # For each of the TokenTensors, the word with which it is given; "" is in every name.
        words = ("", "", "reference", "rollout", "", "", "sequence")
        tensors = [torch.rand(sizes.tokens, device=device) if w in present else None for w in words]
        read = sum(word in present for word in words)
        dual_clip = 3.0 if "dual clip" in present else None
        objective = "cispo" if "cispo" in present else "ppo"
        settings = PolicySettings(0.2, 0.2, dual_clip, 0.001, "k3", 2.0, objective)
        arguments = TokenTensors._make(tensors), settings
        name = f"policy_terms {present}".strip()
        yield Example(name, arguments, 4 * read + 24, sizes.tokens)


def _segment_sums(sizes: Sizes, device: str) -> Iterator[Example]:
    length = sizes.tokens // sizes.sequences
    borders = torch.arange(sizes.sequences + 1, dtype=torch.int32, device=device) * length
    values = torch.randn(sizes.sequences * length, device=device)
    yield Example("segment_sums", (values, borders), 4, len(values))


def _quantize_blocks(sizes: Sizes, device: str) -> Iterator[Example]:
    for block in ((128, 128), (1, 128)):
        x = torch.randn(sizes.weight, dtype=BF16, device=device)
        least = 2 + 1 + 4 / (block[0] * 128)
        yield Example(f"quantize {block[0]}x128 bf16", (x, block), least, x.numel())


def _dequantize_blocks(sizes: Sizes, device: str) -> Iterator[Example]:
    for block in ((128, 128), (1, 128)):
        q = torch.randn(sizes.weight, device=device).to(torch.float8_e4m3fn)
        blocks = [-(-size // along) for size, along in zip(sizes.weight, block, strict=True)]
        arguments = q, torch.rand(blocks, device=device), block, BF16
        least = 1 + 2 + 4 / (block[0] * 128)
        yield Example(f"dequantize {block[0]}x128 bf16", arguments, least, q.numel())


def _targets(sizes: Sizes, device: str) -> Tensor:
    return torch.randint(sizes.vocab, (sizes.tokens,), device=device)


KERNELS = (
    Kernel(
        "row_statistics",
        "of each row of logits: largest, Σ eˣ, Σ x eˣ, the target's logit",
        "b per logit, 8 per row → 16 per row",
        _row_statistics,
        "token_logprobs",
    ),
    Kernel(
        "logits_gradient",
        "the gradient of the logits, over them if wanted",
        "b per logit, 20 per row (28 with an entropy gradient) → 2 or 4 per logit",
        _logits_gradient,
        "token_logprobs",
    ),
    Kernel(
        "policy_terms",
        "loss, its derivatives, ratio, clip, KL, importance weight",
        "16 to 28 per token (4 to 7 floats) → 24 per token, 4 per 512 tokens",
        _policy_terms,
        "policy_loss",
    ),
    Kernel(
        "segment_sums",
        "sums over packed sequences",
        "4 per token, two borders per sequence → 4 per sequence",
        _segment_sums,
    ),
    Kernel(
        "quantize_blocks",
        "FP8 e4m3 codes and a scale per 128×128 or 1×128 block",
        "b per element → 1 per element, 4 per block",
        _quantize_blocks,
        "quantize_blockwise",
    ),
    Kernel(
        "dequantize_blocks",
        "codes times the scale of their block",
        "1 per element, 4 per block → 2 or 4 per element",
        _dequantize_blocks,
        "dequantize_blockwise",
    ),
)
