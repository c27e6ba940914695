"""A rollout on its way from the engines to the trainer: token ids, log-probabilities, routing."""

from __future__ import annotations

from megatron_r1.models.routing_shape import routing_shape
from megatron_r1.reporting.wording import counted
from tools.plan.job import Job
from tools.plan.quantity import Quantity, Section

ID = LOGPROB = 4
"""Bytes of a token's id and of its log-probability, as training/wire.py sends them."""


def samples_section(job: Job) -> Section:
    """Bytes of one rollout through the controller."""
    prompt, response = job.assumptions.prompt_tokens, job.response_tokens
    section = {
        "ids, log-probabilities": Quantity(
            job.outputs * ((prompt + response) * ID + response * LOGPROB),
            "B",
            f"{job.outputs:,} samples x ({prompt + response:,} ids x {ID} B + {response:,} "
            f"log-probabilities x {LOGPROB} B)",
        )
    }
    if job.has_experts:
        shape = routing_shape(job.hf)
        section["routed experts"] = Quantity(
            job.outputs * (prompt + response) * shape.token_bytes,
            "B",
            f"with rl.routing_replay: {job.outputs:,} samples x {prompt + response:,} tokens x "
            f"{counted(len(shape.moe_layers), 'layer')} x {shape.topk} experts x "
            f"{shape.index_bytes} B",
        )
    return section
