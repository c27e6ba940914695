"""A patch of vLLM 0.32's CPU build for speculative decoding; without it, and without the CPU's
`--no-async-scheduling` in `engine/settings.py`, tests/system/test_speculative.py fails."""

from typing import Any

import torch


def apply() -> None:
    """Apply the patch. On CPU, once."""
    expand_temperatures()


def expand_temperatures() -> None:
    """Give every drafted token the temperature and top-p of its sequence.

    Upstream: utils/cpu_triton_utils.py:390 (`_expand_kernel_impl`), behind
    v1/sample/rejection_sampler.py:581 (`expand_batch_to_tokens`). Without it: the kernel fills a
    copy of its output, of integers, and logits are divided by uninitialized memory: tokens from
    another distribution, log-probabilities that are not finite. Goes when: it writes to its output.
    """
    from vllm.v1.sample import rejection_sampler

    rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens


def expand_batch_to_tokens(
    x: torch.Tensor,
    cu_num_tokens: torch.Tensor,
    num_tokens: int,
    replace_from: Any = 0,
    replace_to: Any = 0,
) -> torch.Tensor:
    """Return each sequence's x [num_seqs] for all its tokens [num_tokens], `replace_from` replaced.

    cu_num_tokens: [num_seqs], where each sequence's tokens end."""
    counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
    replaced = torch.where(x == replace_from, torch.full_like(x, replace_to), x)
    return replaced.repeat_interleave(counts, output_size=num_tokens)
