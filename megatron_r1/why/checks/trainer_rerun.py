"""The distance of one trainer rank from the engines and from transformers, against that of the
run's trainer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_r1.reporting.formatting import finite_metric
from megatron_r1.why.checks import policies
from megatron_r1.why.checks.rerun_kind import Rerun, rerun_comparison, run_in_scratch_folder
from megatron_r1.why.comparison import ROUNDING_BY_DTYPE, Comparison
from megatron_r1.why.record.recorded_step import RecordedStep
from megatron_r1.why.rerun.readings import Distances, Reading, distance, trainer_reading

if TYPE_CHECKING:
    from megatron_r1.why.update.recomputation import Recomputation


def _check_trainer(
    step: RecordedStep, recomputation: Recomputation, refined_comparison: Comparison
) -> tuple[Comparison, Reading]:
    """Compare the distance of one rank from the engine with that of the run's trainer, and the rank
    with transformers."""
    from megatron_r1.why.rerun import single_rank

    single_rank.check_rank(
        step, recomputation.models.num_parameters, recomputation.models.free_bytes
    )

    async def measure(scratch: Path) -> single_rank.RankDistances:
        return await single_rank.measure(step, recomputation.policies.old_logprobs, scratch)

    rank_distances = run_in_scratch_folder(measure)
    recorded_distance = finite_metric(step.metrics_row, single_rank.METRIC)
    distances = Distances(
        refined_comparison.distance,
        distance(
            math.nan if recorded_distance is None else recorded_distance, rank_distances.engine
        ),
        rank_distances.transformers,
    )
    tolerance = ROUNDING_BY_DTYPE[step.run_config.model.dtype]
    layout = single_rank.layout_text(step.run_config.parallel)
    reading = trainer_reading(distances, tolerance, refined_comparison.differs, layout)
    subject = (
        "of the same tokens; |Δ|: "
        f"{distances.text('one rank')}; {layout or 'the run had one rank too'}"
    )
    return rerun_comparison(TRAINER, subject, distances, tolerance, reading), reading


TRAINER = Rerun(
    policies.POLICIES_STAGE,
    "one rank's log-probabilities",
    policies.TRAINER,
    "starting one trainer rank",
    _check_trainer,
)
