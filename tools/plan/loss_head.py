"""The fused loss head: what it needs beside hidden states (r1_kernels, docs/kernels.md)."""

from __future__ import annotations

from tools.plan.job import Job

# r1_kernels.linear_head; not imported, as it would bring torch.
GPU_CHUNK_TOKENS = 4096
GPU_CHUNK_ELEMENTS = 1 << 27


def head_bytes(job: Job) -> tuple[int, str]:
    """(bytes, formula) on a rank of the last stage, for its largest micro-batch.

    A chunk of fp32 logits and one of their gradient; the hidden states and their gradient, whole
    along the sequence; the weight's gradient in fp32 while it is summed over chunks and in the
    parameter's dtype when it is handed on.
    """
    outputs, hidden = job.rules.head[0].sources[0].shape
    if outputs == 1:
        return _score_head_bytes(job, hidden)
    columns = -(-outputs // job.parallel.tensor)
    tokens = job.microbatch_tokens // job.parallel.context
    rows = min(tokens, max(GPU_CHUNK_TOKENS, GPU_CHUNK_ELEMENTS // columns))
    value = job.parameter_bytes
    num_bytes = rows * columns * (4 + value) + tokens * hidden * 2 * value
    num_bytes += columns * hidden * (4 + value)
    formula = (
        f"{rows} x {columns} logits x {4 + value} B + {tokens} x {hidden} states x {2 * value} B + "
        f"{columns} x {hidden} weight gradient x {4 + value} B"
    )
    return num_bytes, formula


def _score_head_bytes(job: Job, hidden: int) -> tuple[int, str]:
    """The states and the weights in fp32, for the product and its gradient."""
    tokens = job.microbatch_tokens // job.parallel.context
    if job.has_experts:  # sequence parallelism
        tokens //= job.parallel.tensor
    formula = f"{tokens} x {hidden} states x (4 + 4) B"
    return tokens * hidden * 8, formula
