"""The engines of the teachers of on-policy distillation, on GPUs of their own."""

from megatron_r1.config import Config
from megatron_r1.config.teacher import TeacherEngineConfig
from megatron_r1.engines.server.model_config import max_positions
from megatron_r1.engines.server.recipe_checks import check_ranks
from megatron_r1.models.hf_config_file import load_raw_hf_config, read_hf_config
from megatron_r1.models.memory import BYTES
from megatron_r1.plan.counts import ModelCounts
from megatron_r1.plan.flops import forward_flops
from megatron_r1.plan.job import PlannedJob
from megatron_r1.plan.quantity import Quantity, QuantityTable, byte_quantity
from megatron_r1.reporting.formatting import format_count

LOGITS_BYTES = 4
"""Bytes of a logit; logits and their log-softmax exist at once."""


def check_planned_teachers(config: Config) -> None:
    """Raise UserError for a teacher that does not exist, or that its ranks cannot share."""
    for key, teacher in config.teacher.sections.items():
        max_positions(teacher.path, f"{key}.path")
        if not teacher.url:
            check_ranks(teacher, load_raw_hf_config(teacher.path, f"{key}.path"), key)


def teacher_section(job: PlannedJob, key: str, teacher: TeacherEngineConfig) -> QuantityTable:
    """Return memory and logprobs' seconds on a teacher's own GPUs, if its model type is supported.

    Args:
        job: the planned run.
        key: the key of the teacher's settings.
        teacher: these settings."""
    try:
        hf_config = read_hf_config(teacher.path, key=f"{key}.path")
    except ValueError as error:
        return {"weights": byte_quantity(None, f"cannot be counted: {error}")}
    has_others = bool(job.config.teacher.by_source)
    ranks = teacher.tensor_parallel * teacher.pipeline_parallel * teacher.data_parallel
    gpus = (len(teacher.url) or teacher.engines) * ranks
    shards, value = teacher.tensor_parallel * teacher.pipeline_parallel, BYTES[teacher.dtype]
    total, tokens = ModelCounts(hf_config).num_total, job.num_responses * job.mean_sample_tokens
    flops = forward_flops(hf_config, job.mean_sample_tokens)
    seconds = tokens * flops / (gpus * job.hardware.bf16 * job.assumptions.compute_efficiency)
    formula = (
        f"{tokens:,} tokens x {flops:.2e} FLOP on {format_count(gpus, 'GPU')}; while the students' "
        "other responses are sampled" + ("; if all questions were its" if has_others else "")
    )
    return {
        "weights": byte_quantity(
            total * value / shards,
            f"{total:,} x {value} B / {format_count(shards, 'GPU')} of an engine",
        ),
        "logits": byte_quantity(
            2 * teacher.max_num_batched_tokens * hf_config["vocab_size"] * LOGITS_BYTES,
            f"2 x {key}.max_num_batched_tokens={teacher.max_num_batched_tokens} x "
            f"{hf_config['vocab_size']} x {LOGITS_BYTES} B, whole on each GPU",
        ),
        "logprobs of a rollout": Quantity(seconds, "s", formula).with_spread(
            job.assumptions.time_spread
        ),
    }
