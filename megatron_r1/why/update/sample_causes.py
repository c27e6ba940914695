"""Yields candidate causes in the samples of an update: lost, used twice, or used in part."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron_r1.why.record.recorded_step import RecordedStep
from megatron_r1.why.update.candidate_cause import CandidateCause

if TYPE_CHECKING:
    from megatron_r1.why.update.recomputation import Recomputation


def sample_causes(step: RecordedStep, recomputation: Recomputation) -> Iterator[CandidateCause]:
    """Yield samples that are lost, used twice, or used in part."""
    yield CandidateCause(
        "prompt tokens in the loss",
        "the mask of the response",
        "the mask of rl.algorithm's loss: prompts are not trained on",
        trains_prompts=True,
    )
    if step.config.rl.routing_replay:
        yield CandidateCause(
            "experts that the trainer chooses",
            "rl.routing_replay",
            "rl.routing_replay: the engine's experts are not replayed",
            routes_itself=True,
        )
    if step.config.rl.minibatches > 1:
        yield CandidateCause(
            "every update on the first mini-batch",
            "rl.minibatches",
            "rl.minibatches: an update trains on its own mini-batch",
            repeats_first=True,
        )
    counts = [len(update[0]) for update in recomputation.inputs.packed_rows]
    if any(count > 1 for count in counts):
        yield CandidateCause(
            "gradients averaged over the micro-batches of an update",
            "parallel.tokens_per_microbatch",
            "the trainer: gradients are summed over micro-batches, and divided by the loss's "
            "denominator alone",
            adam=(("gradient_factors", tuple(1 / count for count in counts)),),
        )
    for name, rows in recomputation.inputs.shares():
        yield CandidateCause(
            f"the gradient of {name} lost",
            "parallel",
            f"parallel: the sum of the gradients leaves out {name}",
            rows_without_gradient=rows,
        )
    if step.hf_config.get("tie_word_embeddings") and step.run_config.model.lora is None:
        yield CandidateCause(
            "a tied head whose gradient the embedding lacks",
            "tie_word_embeddings",
            "parallel.pipeline: first and last stage hold copies of the tied head, whose gradients "
            "are summed",
            unties_head=True,
        )
