"""Attention of these context-parallel ranks, and of one alone: `ring_steps.py OUT`.

Writes to OUT/RANK.json the largest differences of outputs and gradients from the unsharded formula
in fp64, per case, and the memory that a long sample takes."""

import json
import resource
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_r1.models import platform

LENGTHS = [[1], [5, 1, 0, 3], [40, 2, 17, 3, 3]]
"""Per batch, in units of 2 * ranks tokens."""
HEADS = [(4, 4, 12, 5), (6, 2, 8, 8), (2, 1, 6, 9)]
"""(query heads, key/value heads, size of keys, of values)."""
LONG = 12_288
"""Tokens of the long sample on a rank; queries x keys of one head would take 0.6 GB in fp32."""


def softmax_attention(query, key, value, lengths, scale):
    """(T, h, d), (T, g, d), (T, g, e) -> (T, h, e), as the formula says it."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    sample = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    at = torch.arange(len(sample))
    hidden = (sample[:, None] != sample) | (at > at[:, None])
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    return torch.einsum("hqk,khe->qhe", scores.masked_fill(hidden, -torch.inf).softmax(-1), value)


def differences(lengths: list[int], heads: tuple[int, int, int, int], dtype) -> dict[str, float]:
    """The largest differences between this rank's share and the same tokens of the whole."""
    from megatron_r1.models.context_parallel import positions_of_rank
    from megatron_r1.models.ring_attention import ring_attention

    rank, ranks = dist.get_rank(), dist.get_world_size()
    lengths = [length * 2 * ranks for length in lengths]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    draw = torch.Generator().manual_seed(sum(lengths))
    h, g, d, e = heads
    sizes = {"query": (h, d), "key": (g, d), "value": (g, e)}
    whole = {
        name: torch.randn(sum(lengths), *size, generator=draw).to(dtype).requires_grad_()
        for name, size in sizes.items()
    }
    weight = torch.randn(sum(lengths), h, e, generator=draw, dtype=torch.float64)
    expected = softmax_attention(*(x.double() for x in whole.values()), lengths, 0.3)
    gradients = torch.autograd.grad((expected * weight).sum(), list(whole.values()))
    held = positions_of_rank(cu_seqlens, rank, ranks)
    own = [x[held].detach().requires_grad_() for x in whole.values()]
    out = ring_attention(*own, cu_seqlens, 0.3, dist.group.WORLD)
    assert out.dtype == dtype
    got = torch.autograd.grad((out.double() * weight[held]).sum(), own)
    found = {"output": (out - expected[held]).abs().max().item()}
    for name, ours, theirs in zip(whole, got, gradients, strict=True):
        found[name] = (ours.double() - theirs[held]).abs().max().item()
    return found


def bytes_of(attend, tokens: int) -> int:
    """How far one sample of `tokens` on this rank, forward and backward, raises the peak of this
    process's memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    query, key = torch.randn(2, tokens, 2, 16).requires_grad_()
    value = torch.randn(tokens, 2, 8).requires_grad_()
    attend(query, key, value).sum().backward()
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def memory() -> dict[str, int]:
    from megatron_r1.models.attention import attend_packed
    from megatron_r1.models.ring_attention import ring_attention

    whole = torch.tensor([LONG])
    cu_seqlens = torch.tensor([0, LONG * dist.get_world_size()])
    return {
        "ring": bytes_of(lambda *x: ring_attention(*x, cu_seqlens, 0.3, dist.group.WORLD), LONG),
        "alone": bytes_of(lambda *x: attend_packed(*x, whole, 0.3), LONG),
    }


def main() -> None:
    platform.prepare_process()
    dist.init_process_group("gloo")
    differing = {
        f"{lengths} {heads} {dtype}": differences(lengths, heads, dtype)
        for lengths in LENGTHS
        for heads in HEADS
        for dtype in (torch.float64, torch.float32, torch.bfloat16)
    }
    report = {"differences": differing, "bytes": memory()}
    Path(sys.argv[1], f"{dist.get_rank()}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
