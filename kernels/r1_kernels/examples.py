"""The launches of each kernel in real runs, for tests, tables and compilation.

The tables are those of `tools/bench kernels`, the ahead-of-time compilation that of `tools/bench
resources`. No computation imports this file.

Each kernel of `registry.KERNELS` has a function here, which yields those launches in each
specialization that compiles to other code. Their sizes are those of DeepSeek-V3's output layer
and of one of its weights, unless the caller gives smaller ones; on PyTorch's meta device they take
no memory."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from r1_kernels.policy_terms import Objective, PolicySettings, TokenTensors
from r1_kernels.registry import Kernel
from r1_kernels.sampling_mask import KeptIds
from r1_kernels.vocabulary import RowUpstream, VocabShard

BF16, FP32 = torch.bfloat16, torch.float32
POLICY_VARIANTS = (
    "",
    "reference",
    "reference, rollout",
    "reference, rollout, dual clip, sequence",
    "reference, rollout, cispo",
)


class ExampleSizes(NamedTuple):
    """The sizes of the launches.

    Attributes:
        num_tokens: tokens, in packed sequences of equal length.
        vocab_size: ids of the vocabulary.
        weight: rows and columns of a weight.
        num_sequences: the packed sequences.
        num_kept: ids that a sampler keeps at each token."""

    num_tokens: int = 65_536
    vocab_size: int = 129_280
    weight: tuple[int, int] = (18_432, 7_168)
    num_sequences: int = 64
    num_kept: int = 64


class ExampleLaunch(NamedTuple):
    """One launch of a primitive with example arguments, and the memory traffic it needs."""

    name: str
    """The kernel and its specialization."""
    arguments: tuple[Any, ...]
    """The primitive's arguments."""
    least_bytes: float
    """Bytes per element that any implementation must move."""
    num_elements: int
    """Elements of the whole launch."""


def example_launches(kernel: Kernel, sizes: ExampleSizes, device: str) -> Iterator[ExampleLaunch]:
    """Yield the launches of a kernel: those of the function of its name in this file.

    Args:
        kernel: an entry of `registry.KERNELS`.
        sizes: the sizes of its arguments.
        device: where these are made."""
    return globals()[kernel.name](sizes, device)


def row_statistics(sizes: ExampleSizes, device: str) -> Iterator[ExampleLaunch]:
    """Yield passes over a whole vocabulary, an eighth of it, and one whose end is padding."""
    tokens, vocab = sizes.num_tokens, sizes.vocab_size
    for name, dtype, columns, num_real in (
        ("bf16", BF16, vocab, vocab),
        ("fp32", FP32, vocab, vocab),
        ("bf16, an eighth", BF16, vocab // 8, vocab // 8),
        # A last id that is no multiple of 16 must not cost the whole loop its wide loads.
        ("bf16, padded", BF16, vocab, vocab - 1),
    ):
        logits = torch.randn(tokens, columns, dtype=dtype, device=device)
        arguments = (
            logits,
            _random_targets(sizes, device),
            _first_rank_shard(columns, num_real, vocab),
            1.0,
        )
        yield ExampleLaunch(f"row_statistics {name}", arguments, dtype.itemsize, logits.numel())


def logits_gradient(sizes: ExampleSizes, device: str) -> Iterator[ExampleLaunch]:
    """Yield gradients over the logits and in a buffer of their own, with and without entropy."""
    names = {BF16: "bf16", FP32: "fp32"}
    vocab = sizes.vocab_size
    for dtype, out_dtype in ((BF16, BF16), (FP32, BF16), (FP32, FP32)):
        for variant in ("", ", entropy", *([", padded"] if out_dtype == dtype == BF16 else [])):
            logits = torch.randn(sizes.num_tokens, vocab, dtype=dtype, device=device)
            rows = torch.randn(5, sizes.num_tokens, device=device).unbind()
            upstream = RowUpstream._make([*rows[:4], rows[4] if "entropy" in variant else None])
            shard = _first_rank_shard(vocab, vocab - ("padded" in variant), vocab)
            target = logits if out_dtype == dtype else torch.empty_like(logits, dtype=out_dtype)
            arguments = logits, _random_targets(sizes, device), shard, 1.0, upstream, target
            name = f"logits_gradient {names[dtype]} to {names[out_dtype]}{variant}"
            yield ExampleLaunch(
                name, arguments, dtype.itemsize + out_dtype.itemsize, logits.numel()
            )


def kept_statistics(sizes: ExampleSizes, device: str) -> Iterator[ExampleLaunch]:
    """Yield passes over the kept ids of a whole vocabulary."""
    for name, dtype in (("bf16", BF16), ("fp32", FP32)):
        logits, targets, shard, kept_ids = _make_kept_arguments(sizes, dtype, device)
        arguments = logits, targets, shard, 1.0, kept_ids
        min_bytes = 4 + dtype.itemsize
        yield ExampleLaunch(
            f"kept_statistics {name}", arguments, min_bytes, len(kept_ids.token_ids)
        )


def kept_gradient(sizes: ExampleSizes, device: str) -> Iterator[ExampleLaunch]:
    """Yield gradients of the kept logits, with and without entropy."""
    for name, dtype in (("bf16", BF16), ("fp32", FP32)):
        for variant in ("", ", entropy"):
            logits, targets, shard, kept_ids = _make_kept_arguments(sizes, dtype, device)
            rows = torch.randn(5, sizes.num_tokens, device=device).unbind()
            upstream = RowUpstream._make([*rows[:4], rows[4] if variant else None])
            arguments = logits, targets, shard, 1.0, upstream, kept_ids
            min_bytes = 8 + dtype.itemsize
            yield ExampleLaunch(
                f"kept_gradient {name}{variant}", arguments, min_bytes, len(kept_ids.token_ids)
            )


def kept_scatter(sizes: ExampleSizes, device: str) -> Iterator[ExampleLaunch]:
    """Yield rows of 0 with the kept ids' values; the bytes are those of the values."""
    for name, dtype in (("bf16", BF16), ("fp32", FP32)):
        logits, _, shard, kept_ids = _make_kept_arguments(sizes, dtype, device)
        values = torch.randn(len(kept_ids.token_ids), device=device)
        arguments = values, shard, kept_ids, logits
        yield ExampleLaunch(f"kept_scatter {name}", arguments, 8 + dtype.itemsize, len(values))


def policy_terms(sizes: ExampleSizes, device: str) -> Iterator[ExampleLaunch]:
    """Yield losses with the optional tensors and settings that `POLICY_VARIANTS` names."""
    tokens = sizes.num_tokens
    for policy_variant in POLICY_VARIANTS:
        # For each of the TokenTensors, the word with which it is given; "" is in every name.
        words = ("", "", "reference", "rollout", "", "", "sequence")
        tensors = [
            torch.rand(tokens, device=device) if w in policy_variant else None for w in words
        ]
        num_read = sum(word in policy_variant for word in words)
        dual_clip = 3.0 if "dual clip" in policy_variant else None
        objective: Objective = "cispo" if "cispo" in policy_variant else "ppo"
        settings = PolicySettings(0.2, 0.2, dual_clip, 0.001, "k3", 2.0, objective)
        arguments = TokenTensors._make(tensors), settings
        name = f"policy_terms {policy_variant}".strip()
        yield ExampleLaunch(name, arguments, 4 * num_read + 24, tokens)


def segment_sums(sizes: ExampleSizes, device: str) -> Iterator[ExampleLaunch]:
    """Yield sums over sequences of equal length."""
    length = sizes.num_tokens // sizes.num_sequences
    borders = torch.arange(sizes.num_sequences + 1, dtype=torch.int32, device=device) * length
    values = torch.randn(sizes.num_sequences * length, device=device)
    yield ExampleLaunch("segment_sums", (values, borders), 4, len(values))


def quantize_blocks(sizes: ExampleSizes, device: str) -> Iterator[ExampleLaunch]:
    """Yield a weight's quantization in blocks of 128x128, and an activation's of 1x128."""
    for block in ((128, 128), (1, 128)):
        x = torch.randn(sizes.weight, dtype=BF16, device=device)
        min_bytes = 2 + 1 + 4 / (block[0] * 128)
        yield ExampleLaunch(f"quantize {block[0]}x128 bf16", (x, block), min_bytes, x.numel())


def dequantize_blocks(sizes: ExampleSizes, device: str) -> Iterator[ExampleLaunch]:
    """Yield the same blocks back."""
    for block in ((128, 128), (1, 128)):
        q = torch.randn(sizes.weight, device=device).to(torch.float8_e4m3fn)
        blocks = [-(-size // along) for size, along in zip(sizes.weight, block, strict=True)]
        arguments = q, torch.rand(blocks, device=device), block, BF16
        min_bytes = 1 + 2 + 4 / (block[0] * 128)
        yield ExampleLaunch(f"dequantize {block[0]}x128 bf16", arguments, min_bytes, q.numel())


def _make_kept_arguments(
    sizes: ExampleSizes, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, VocabShard, KeptIds]:
    """Return logits, targets among the kept ids, the whole vocabulary and the kept ids."""
    tokens, vocab = sizes.num_tokens, sizes.vocab_size
    count = min(sizes.num_kept, max(1, vocab // 4))
    spacing = vocab // count
    first = torch.randint(spacing, (tokens, 1), device=device)
    ids = (first + spacing * torch.arange(count, device=device)).flatten().int()
    offsets = count * torch.arange(tokens + 1, device=device)
    logits = torch.randn(tokens, vocab, dtype=dtype, device=device)
    kept_ids = KeptIds(ids, offsets[:-1], offsets[1:])
    return logits, ids[kept_ids.starts].long(), _first_rank_shard(vocab, vocab, vocab), kept_ids


def _random_targets(sizes: ExampleSizes, device: str) -> Tensor:
    return torch.randint(sizes.vocab_size, (sizes.num_tokens,), device=device)


def _first_rank_shard(num_columns: int, num_real: int, vocab_size: int) -> VocabShard:
    """Return the first rank's shard. Without a group: a primitive works on one rank alone."""
    return VocabShard(
        first_column=0,
        num_columns=num_columns,
        num_real=num_real,
        vocab_size=vocab_size,
        group=None,
    )
