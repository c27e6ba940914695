"""Compares log-probabilities of the trainer's old policy with those of the checkpoint that it comes
from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from megatron_r1.reporting.formatting import format_number
from megatron_r1.reporting.record_values import finite_metric
from megatron_r1.why.checks.engine_causes import adapter_scales
from megatron_r1.why.checks.reference_weights import POLICIES_STAGE, compare_reference
from megatron_r1.why.comparison import (
    DEPARTS,
    EQUAL,
    ROUNDING_BY_DTYPE,
    Comparison,
    not_checked,
    with_untried,
)
from megatron_r1.why.record.recorded_step import RecordedStep
from megatron_r1.why.rerun.rerun_verdicts import TRAINER_REMEDY, rerun_hint

if TYPE_CHECKING:
    from megatron_r1.why.update.recomputation import Recomputation

TRAINER = "old policy of the trainer"
TrainerCandidate = tuple[str, str, Callable[[], Sequence[np.ndarray] | None]]
"""A candidate cause: what it is, in words, the remedy, and the function that returns the
log-probabilities that the trainer would have."""


def compare_policies(step: RecordedStep, recomputation: Recomputation) -> list[Comparison]:
    """Return the comparisons of the trainer's log-probabilities and of its reference."""
    return [_compare_trainer(step, recomputation), compare_reference(step, recomputation)]


def _compare_trainer(step: RecordedStep, recomputation: Recomputation) -> Comparison:
    """Compare logprob_diff/mean, engine's against trainer's, with engine's against transformers."""
    logged_gap = finite_metric(step.metrics_row, "logprob_diff/mean")
    if "logprob_diff/mean" not in step.metrics_row:
        return not_checked(POLICIES_STAGE, TRAINER, "metrics.jsonl has no logprob_diff/mean")
    if (recipe := step.run_config.fp8.recipe) != "none":
        return not_checked(
            POLICIES_STAGE, TRAINER, f"fp8.recipe: {recipe}: its products are not made"
        )
    if len(recomputation.policies.computed_sequences) < len(recomputation.models.rows):
        return not_checked(
            POLICIES_STAGE, TRAINER, "only a part of the responses is recomputed here"
        )
    gaps = [
        np.abs(sequence.logprobs - logprobs)
        for sequence, logprobs in zip(
            recomputation.models.sequences, recomputation.policies.old_logprobs, strict=True
        )
        if not math.isnan(sequence.advantage)
    ]
    mean_gap = float(np.concatenate(gaps).mean())
    tolerance = ROUNDING_BY_DTYPE[step.run_config.model.dtype]
    if logged_gap is None:
        return Comparison(
            POLICIES_STAGE,
            TRAINER,
            DEPARTS,
            f"logprob_diff/mean with mean |engine - transformers| {format_number(mean_gap)}",
            math.inf,
            tolerance,
            reason=f"logprob_diff/mean is not a number in metrics.jsonl, {format_number(mean_gap)} "
            "recomputed",
            remedy="what makes NaN in the trainer: model.dtype, model.fusions, fp8, its checkpoint"
            + rerun_hint(step, "trainer"),
        )
    distance = abs(mean_gap - logged_gap)
    departs = distance > tolerance
    untried_causes: list[str] = []
    reason, remedy = (
        _find_trainer_cause(step, recomputation, untried_causes) if departs else None
    ) or (
        f"the trainer is {format_number(logged_gap)} from the engine, transformers "
        f"{format_number(mean_gap)}: the trainer computes old log-probabilities of other weights, "
        "or at another temperature",
        TRAINER_REMEDY + rerun_hint(step, "trainer"),
    )
    return Comparison(
        POLICIES_STAGE,
        TRAINER,
        DEPARTS if departs else EQUAL,
        f"mean |engine - trainer| {format_number(logged_gap)} with mean |engine - transformers| "
        f"{format_number(mean_gap)}",
        distance,
        tolerance,
        "rounding of model.dtype (docs/compare.md)",
        with_untried(reason, untried_causes),
        remedy=remedy,
    )


def _find_trainer_cause(
    step: RecordedStep, recomputation: Recomputation, untried_causes: list[str]
) -> tuple[str, str] | None:
    """Return what gives the trainer's logged distances from the engine, and the remedy; add to
    `untried_causes` what could not be tried."""
    from megatron_r1.why.policy.step_models import NotInMemory

    for noun, remedy, make in _trainer_candidates(step, recomputation):
        try:
            logprobs = make()
        except NotInMemory:
            untried_causes.append(noun.rstrip(","))
            continue
        if logprobs is not None and _is_logged(step, recomputation, logprobs):
            return f"the trainer's are as those of transformers {noun} are", remedy
    all_logprobs = recomputation.policies.all_token_logprobs()
    # The engine has none of the prompt, for which the trainer then compares with 0.
    engine_logprobs = [
        np.concatenate(
            [np.zeros(len(logprobs_of_all) - len(sequence.logprobs), np.float32), sequence.logprobs]
        )
        for logprobs_of_all, sequence in zip(
            all_logprobs, recomputation.models.sequences, strict=True
        )
    ]
    if _is_logged(step, recomputation, all_logprobs, engine_logprobs):
        return (
            "the trainer's are as those of transformers of all tokens, prompts too, are: the mask "
            "of the response leaves prompt tokens in the loss",
            "the mask of rl.algorithm's loss: prompts are not trained on",
        )
    return _parted_head(step)


def _trainer_candidates(step: RecordedStep, recomputation: Recomputation) -> list[TrainerCandidate]:
    """Return the candidate causes of the trainer's departure, in the order in which they are
    tried."""
    from megatron_r1.why.policy.changed_parts import ChangedPartLogprobs

    newest_version, lora = step.step - 1, step.run_config.model.lora
    changed_parts = ChangedPartLogprobs(recomputation.policies)
    return [
        (
            "at temperature 1",
            "rollout.temperature: the trainer divides the logits by another",
            lambda: recomputation.policies.logprobs_under(recomputation.models.policy, 1.0),
        ),
        (
            "of the token before, shifted by one,",
            "the trainer's targets: a position predicts the token after it",
            recomputation.policies.shifted_logprobs,
        ),
        *(
            (
                f"with the weights of version {version}",
                f"the checkpoint of step {newest_version}, or the trainer: it computes with others",
                partial(recomputation.policies.logprobs_after, version),
            )
            for version in {newest_version - 1, 0} - {newest_version, -1}
        ),
        *(
            (
                f"with adapters times {scale:g} ({noun})",
                "model.lora: the trainer adds the product of adapters with a scale other than "
                "alpha / rank",
                partial(changed_parts.logprobs_with_adapter_scale, scale),
            )
            for scale, noun in (adapter_scales(lora).items() if lora else ())
        ),
        (
            "that chooses the experts itself",
            "rl.routing_replay: the engine's experts are not replayed",
            recomputation.policies.without_replay,
        ),
        (
            "with the tied head as the run began with it",
            "parallel.pipeline: first and last stage hold copies of the embedding, the tied head's "
            "is not trained with it",
            changed_parts.logprobs_with_head_apart,
        ),
        *(
            (
                "of packed samples that attend to those before them in the micro-batch, with "
                f"positions that {noun},",
                "the borders of packed samples in the trainer's attention: parallel.context, "
                "parallel.tokens_per_microbatch, model.fusions",
                partial(_packed_logprobs, recomputation, restarts=restarts),
            )
            for restarts, noun in ((True, "begin anew"), (False, "go on"))
        ),
    ]


def _packed_logprobs(recomputation: Recomputation, *, restarts: bool) -> list[np.ndarray] | None:
    """Return those of samples that attend to others of their micro-batch; None where micro-batches
    share prompts or are of one sample each."""
    microbatches = [
        rows for update in recomputation.inputs.packed_rows for share in update for rows in share
    ]
    return recomputation.policies.packed_logprobs(microbatches, restarts=restarts)


def _parted_head(step: RecordedStep) -> tuple[str, str] | None:
    """Return that the copy of a tied head, which no checkpoint holds, parted from the embedding.
    It does where the trainer was at the engine in the run's first step and is not now."""
    is_trained = step.hf_config.get("tie_word_embeddings") and step.run_config.model.lora is None
    if step.run_config.parallel.pipeline == 1 or not is_trained:
        return None
    first_gap = next(iter(step.folder.read_metrics()), {}).get("logprob_diff/mean")
    if (
        not isinstance(first_gap, int | float)
        or first_gap > ROUNDING_BY_DTYPE[step.run_config.model.dtype]
    ):
        return None
    return (
        f"the trainer was {format_number(first_gap)} from the engine in the first step, and is "
        f"{format_number(step.metrics_row['logprob_diff/mean'])} now: of a tied head the last "
        "stage has a copy, which is in no checkpoint, and which parted from the embedding",
        "parallel.pipeline: the gradients of both copies of a tied embedding are summed",
    )


def _is_logged(
    step: RecordedStep,
    recomputation: Recomputation,
    logprobs: Sequence[np.ndarray],
    engine: Sequence[np.ndarray] | None = None,
) -> bool:
    """Return whether log-probabilities are as far from the engine's as those of the trainer."""
    engine_logprobs = engine or [sequence.logprobs for sequence in recomputation.models.sequences]
    gaps = np.concatenate(
        [
            np.abs(logged_logprobs - recomputed_logprobs)
            for sequence, logged_logprobs, recomputed_logprobs in zip(
                recomputation.models.sequences, engine_logprobs, logprobs, strict=True
            )
            if not math.isnan(sequence.advantage)
        ]
    )
    tolerance = ROUNDING_BY_DTYPE[step.run_config.model.dtype]
    distances = {"logprob_diff/mean": float(gaps.mean()), "logprob_diff/max": float(gaps.max())}
    return all(
        (logged := finite_metric(step.metrics_row, name)) is not None
        and abs(logged - value) <= max(tolerance, tolerance * value)
        for name, value in distances.items()
        if name in step.metrics_row
    )
