"""Says what log-probabilities that are computed again show of a departure: they are those that the
run recorded, those of transformers, or neither."""

from __future__ import annotations

import math
from enum import Enum
from typing import NamedTuple

from megatron_r1.reporting.formatting import format_number
from megatron_r1.why.record.recorded_step import RecordedStep

MAX_SIDE_FRACTION = 0.5
"""A rerun is on a side if it is nearer to it, by this factor or more, than the sides are to each
other."""
TOO_SMALL = (
    "is within rounding of transformers, and the departure is too small to tell on which side it is"
)
HINT = "; next: "
"""Between a remedy and the command that makes a rerun."""
ENGINE_REMEDY = (
    "rollout.dtype, rollout.vllm (quantization, kernels), or megatron-r1 check-model on the model"
)
PUSH_REMEDY = "the push: logs/engine-*.log, push/* in metrics.jsonl, push.transport (docs/push.md)"
TRAINER_REMEDY = (
    "rollout.temperature in rl.schedule, model.fusions, fp8, parallel; megatron-r1 check-model "
    "with this layout"
)


def rerun_hint(step: RecordedStep, kind: str) -> str:
    """Return the command that makes a rerun, to be put behind a remedy.

    Args:
        step: what the run recorded of it.
        kind: what --rerun takes."""
    return f"{HINT}megatron-r1 why {step.folder.path} --step {step.step} --rerun {kind}"


class NearestSide(Enum):
    """Which side the log-probabilities of a rerun are on."""

    RECORDED = "what the run recorded"
    TRANSFORMERS = "transformers"
    NEITHER = "neither"


class Distances(NamedTuple):
    """Distances between what the run recorded, transformers and a rerun, in nats.

    Attributes:
        recorded_to_transformers: the distance of what the run recorded from transformers.
        recorded_to_rerun: the distance of what the run recorded from the rerun; NaN: not compared.
        rerun_to_transformers: the distance of the rerun from transformers."""

    recorded_to_transformers: float
    recorded_to_rerun: float
    rerun_to_transformers: float

    def text(self, rerun: str) -> str:
        """Return the distances as text.

        Args:
            rerun: what the rerun is called."""
        rerun_text = (
            "not compared"
            if math.isnan(self.recorded_to_rerun)
            else format_number(self.recorded_to_rerun)
        )
        return (
            f"recorded from transformers {format_number(self.recorded_to_transformers)}, recorded "
            f"from {rerun} {rerun_text}, {rerun} from transformers "
            f"{format_number(self.rerun_to_transformers)}"
        )


class RerunVerdict(NamedTuple):
    """What a rerun says.

    Attributes:
        side: the side that it is on.
        departs: whether the rerun itself departs from transformers.
        conclusion: a sentence, which names the side at fault where something departs.
        remedy: what to change; "" where nothing departs."""

    side: NearestSide
    departs: bool
    conclusion: str
    remedy: str = ""


def absolute_distance(a: float, b: float) -> float:
    """Return |a - b|: 0 where neither is finite, infinite where one of them is not."""
    if math.isfinite(a) and math.isfinite(b):
        return abs(a - b)
    return math.inf if math.isfinite(a) or math.isfinite(b) else 0.0


def nearest_side(distances: Distances, tolerance: float, recorded_departs: bool) -> NearestSide:
    """Return the side that a rerun is on.

    Of a departure of little more than the tolerance both sides may be within it of the rerun, and
    a cause that is smaller than the tolerance may be known: hence `MAX_SIDE_FRACTION`.

    Args:
        distances: those between the run, transformers and the rerun.
        tolerance: the largest distance that is rounding.
        recorded_departs: whether what the run recorded departs from transformers."""
    limit = tolerance
    if recorded_departs and math.isfinite(distances.recorded_to_transformers):
        limit = min(tolerance, MAX_SIDE_FRACTION * distances.recorded_to_transformers)
    if distances.rerun_to_transformers <= limit:  # NaN is not
        return NearestSide.TRANSFORMERS
    return NearestSide.RECORDED if distances.recorded_to_rerun <= limit else NearestSide.NEITHER


def engine_verdict(distances: Distances, tolerance: float, recorded_departs: bool) -> RerunVerdict:
    """Return what a fresh engine on the weights before the step says.

    Args:
        distances: the distances; `recorded_to_rerun` NaN: the run's sampling cannot be scored.
        tolerance: the largest distance that is rounding.
        recorded_departs: whether the logged log-probabilities depart from transformers'."""
    side = nearest_side(distances, tolerance, recorded_departs)
    if not recorded_departs:
        return _verdict_without_departure(
            side,
            "a fresh engine agrees with transformers, as the run's did",
            "a fresh engine departs from transformers, and the run's did not: vLLM, its settings "
            "or the machine are not those of the run",
            ENGINE_REMEDY,
        )
    if side is NearestSide.NEITHER and distances.rerun_to_transformers <= tolerance:
        return RerunVerdict(side, False, f"a fresh engine {TOO_SMALL}", ENGINE_REMEDY)
    if side is NearestSide.TRANSFORMERS:
        return RerunVerdict(
            side,
            False,
            "a fresh engine agrees with transformers on the weights before the step: the run's "
            "engine had other weights or another state (the push), or another setting of its "
            "sampler, which scoring does not use",
            PUSH_REMEDY,
        )
    if side is NearestSide.RECORDED:
        conclusion = (
            "a fresh engine gives the logged values on the weights before the step: the engine's "
            "function differs from transformers' (dtype, kernel, settings), the push is right"
        )
    elif math.isnan(distances.recorded_to_rerun):
        conclusion = (
            "a fresh engine departs from transformers at temperature 1 too: the engine's function "
            "differs (dtype, kernel, settings); whether it gives the logged values was not compared"
        )
    else:
        conclusion = (
            "a fresh engine gives neither the logged values nor transformers': the engine's "
            "function differs (dtype, kernel, settings), and the run's engine had other weights, "
            "another state or other settings besides"
        )
    return RerunVerdict(side, True, conclusion, ENGINE_REMEDY)


def trainer_verdict(
    distances: Distances, tolerance: float, recorded_departs: bool, layout: str
) -> RerunVerdict:
    """Return what one rank without parallelism says of the trainer's recorded distance.

    Args:
        distances: those between the run, transformers and the rerun.
        tolerance: the largest distance that is rounding.
        recorded_departs: whether the trainer's recorded distance departs from transformers'.
        layout: the run's layout as text; "" for one rank."""
    side = nearest_side(distances, tolerance, recorded_departs)
    if not recorded_departs:
        return _verdict_without_departure(
            side,
            "one rank without parallelism agrees with transformers, as the run's trainer did",
            "one rank without parallelism departs from transformers, and the run's trainer did "
            "not: software or machine are not those of the run",
            TRAINER_REMEDY,
        )
    if side is NearestSide.NEITHER and distances.rerun_to_transformers <= tolerance:
        return RerunVerdict(
            side, False, f"one rank without parallelism {TOO_SMALL}", TRAINER_REMEDY
        )
    if side is NearestSide.TRANSFORMERS and layout:
        conclusion = (
            "one rank without parallelism agrees with transformers: the run's layout is the cause "
            f"({layout}), or a state of its ranks that no checkpoint has"
        )
        return RerunVerdict(side, False, conclusion, f"{layout} (docs/parallelism.md)")
    if side is NearestSide.TRANSFORMERS:
        conclusion = (
            "one rank agrees with transformers, and the run had one rank too: its weights or state "
            "were not those of the checkpoint"
        )
        return RerunVerdict(side, False, conclusion, TRAINER_REMEDY)
    if side is NearestSide.RECORDED:
        conclusion = (
            "one rank without parallelism departs likewise: the trainer's function differs from "
            "transformers' (the model's code, fusions, fp8, temperature), and the layout is "
            "not the cause"
        )
    else:
        conclusion = (
            "one rank without parallelism departs from transformers, and otherwise than the run's "
            "trainer: the trainer's function differs (the model's code, fusions, fp8, "
            "temperature), and its layout or state changes more"
        )
    return RerunVerdict(side, True, conclusion, TRAINER_REMEDY)


def _verdict_without_departure(
    side: NearestSide, agreement: str, departure: str, remedy: str
) -> RerunVerdict:
    """Return the verdict of a rerun where what the run recorded does not depart."""
    if side is NearestSide.TRANSFORMERS:
        return RerunVerdict(side, False, agreement)
    return RerunVerdict(side, True, departure, remedy)
