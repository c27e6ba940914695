"""The teacher of on-policy distillation: its engines' memory, and the time to score a rollout."""

from __future__ import annotations

from megatron_r1.models.hf_config import read_hf_config
from tools.plan.flops import forward_flops
from tools.plan.job import BYTES, Job
from tools.plan.parameters import ModelCounts
from tools.plan.quantity import Quantity, Section

LOGITS = 4
"""Bytes of a logit. They and their log-softmax exist together."""


def teacher_section(job: Job) -> Section:
    """On GPUs of its own; of a model that can be counted, which a teacher need not be."""
    teacher = job.config.teacher
    hf = read_hf_config(teacher.path)
    ranks = teacher.tensor * teacher.pipeline * teacher.data
    gpus = (len(teacher.url) or teacher.engines) * ranks
    split, value = teacher.tensor * teacher.pipeline, BYTES[teacher.dtype]
    total, tokens = ModelCounts(hf).total, job.outputs * job.sample_tokens
    flops = tokens * forward_flops(hf, job.sample_tokens)
    seconds = flops / (gpus * job.hardware.bf16 * job.assumptions.compute_efficiency)
    return {
        "weights": Quantity(
            total * value / split, "B", f"{total:,} x {value} B / {split} GPUs of an engine"
        ),
        "logits": Quantity(
            2 * teacher.tokens_at_once * hf["vocab_size"] * LOGITS,
            "B",
            f"2 x teacher.tokens_at_once={teacher.tokens_at_once} x {hf['vocab_size']} x {LOGITS} "
            "B, whole on each GPU",
        ),
        "scoring a rollout": Quantity(
            seconds,
            "s",
            f"{tokens:,} tokens x {forward_flops(hf, job.sample_tokens):.2e} FLOP on {gpus} GPUs; "
            "while the students' other answers are sampled",
        ),
    }
