"""The teacher of on-policy distillation: its engines' memory and the time to score a rollout."""

from __future__ import annotations

from megatron_r1.config import Config
from megatron_r1.engine.recipe import check_ranks, positions
from megatron_r1.models.hf_config import load_config, read_hf_config
from megatron_r1.reporting.wording import counted
from tools.plan.flops import forward_flops
from tools.plan.job import BYTES, Job
from tools.plan.parameters import ModelCounts
from tools.plan.quantity import Quantity, Section

LOGITS = 4
"""Bytes of a logit; logits and their log-softmax exist at once."""


def check_teacher(config: Config) -> None:
    """Raise UserError for a teacher that does not exist, or that its ranks cannot share."""
    positions(config.teacher.path, "teacher.path")
    if not config.teacher.url:
        check_ranks(config.teacher, load_config(config.teacher.path, "teacher.path"), "teacher")


def teacher_section(job: Job) -> Section:
    """Return memory and scoring time on the teacher's own GPUs, if its model type is supported."""
    teacher = job.config.teacher
    try:
        hf = read_hf_config(teacher.path, key="teacher.path")
    except ValueError as error:
        return {"weights": Quantity(None, "B", f"cannot be counted: {error}")}
    ranks = teacher.tensor * teacher.pipeline * teacher.data
    gpus = (len(teacher.url) or teacher.engines) * ranks
    split, value = teacher.tensor * teacher.pipeline, BYTES[teacher.dtype]
    total, tokens = ModelCounts(hf).total, job.outputs * job.sample_tokens
    flops = tokens * forward_flops(hf, job.sample_tokens)
    seconds = flops / (gpus * job.hardware.bf16 * job.assumptions.compute_efficiency)
    return {
        "weights": Quantity(
            total * value / split,
            "B",
            f"{total:,} x {value} B / {counted(split, 'GPU')} of an engine",
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
            f"{tokens:,} tokens x {forward_flops(hf, job.sample_tokens):.2e} FLOP on "
            f"{counted(gpus, 'GPU')}; while the students' other answers are sampled",
        ),
    }
