"""Compares the tensors and counters of the checkpoints around a step with each other."""

from __future__ import annotations

from pathlib import Path

from megatron_r1.models.weights.adapter_table import A
from megatron_r1.reporting.formatting import format_number
from megatron_r1.trainer.checkpoints.checkpoint_folders import SHOWN_FAULTS
from megatron_r1.trainer.checkpoints.manifest import MANIFEST, manifest_faults
from megatron_r1.why.comparison import DEPARTS, EQUAL, Comparison, not_checked
from megatron_r1.why.record.recorded_step import RecordedStep

FAMILY, CHECKPOINT = "optimizer", "checkpoint"
FAMILY_BY_CHECKPOINT = {"before": CHECKPOINT, "after": FAMILY}
"""The families of a checkpoint's comparisons: what is in the one before a step is its input."""
MAX_STEP_FACTOR = 10.0
"""Times the learning rate that Adam may move a number by: |m| / √v is at most 1.2 with the default
β1 and β2, by Cauchy and Schwarz, and more where moments are lost."""


def compare_states(step: RecordedStep) -> list[Comparison]:
    """Return the comparisons of the checkpoints' tensors and counters."""
    from megatron_r1.why.policy import checkpoint_tensors

    comparisons: list[Comparison] = []
    checkpoints = {
        moment: path
        for moment, path in (("before", step.checkpoint_before), ("after", step.checkpoint_after))
        if path is not None and not (path / "config.json").is_file()
    }
    files = {moment: _compare_checksums(step, moment, path) for moment, path in checkpoints.items()}
    comparisons += files.values()
    if any(comparison.differs for comparison in files.values()):
        return comparisons
    comparisons.append(_compare_tied_head(step))
    for moment in ("before", "after"):
        if moment not in checkpoints:
            is_first = moment == "before" and step.step == 1
            reason = "the run begins with a model" if is_first else "it is not kept"
            comparisons.append(
                not_checked(FAMILY_BY_CHECKPOINT[moment], f"checkpoint {moment} the step", reason)
            )
            continue
        path = checkpoints[moment]
        comparisons += [_find_non_finite(moment, path), _compare_counters(step, moment, path)]
        comparisons += [_compare_moments(step, moment, path), _compare_masters(step, moment, path)]
    is_adapted = step.run_config.model.lora is not None and step.step == 1
    if step.checkpoint_before is not None and step.checkpoint_after is not None and not is_adapted:
        moves_bias = step.config.model.expert_bias_update_rate > 0
        largest_change = checkpoint_tensors.find_largest_change(
            step.checkpoint_before, step.checkpoint_after, step.model, moves_bias
        )
        comparisons.append(_compare_size_of_change(step, *largest_change))
    return comparisons


def _compare_checksums(step: RecordedStep, moment: str, path: Path) -> Comparison:
    """Check that a checkpoint's files have the sizes and checksums they were written with."""
    name = f"files of the checkpoint {moment}"
    if path.parent != step.folder.checkpoints and not (path / MANIFEST).is_file():
        return not_checked(CHECKPOINT, name, f"{path} has no {MANIFEST}: it was made elsewhere")
    faults = manifest_faults(path)
    return Comparison(
        CHECKPOINT,
        name,
        DEPARTS if faults else EQUAL,
        f"sizes and checksums of {path.name} with its {MANIFEST}",
        float(len(faults)),
        0.0,
        "exact",
        f"{path.name} is damaged: {'; '.join(faults[:SHOWN_FAULTS])}",
        remedy=f"{path}: put a good copy there",
    )


def _find_non_finite(moment: str, path: Path) -> Comparison:
    from megatron_r1.why.policy import checkpoint_tensors

    bad_names = checkpoint_tensors.non_finite_tensor_names(path)
    return Comparison(
        FAMILY_BY_CHECKPOINT[moment],
        f"numbers of the checkpoint {moment}",
        DEPARTS if bad_names else EQUAL,
        f"every tensor of {path.name} is finite",
        float(len(bad_names)),
        0.0,
        "exact",
        f"not finite: {', '.join(bad_names[:3])}"
        + (f" and {len(bad_names) - 3} more" if len(bad_names) > 3 else ""),
        remedy="optimizer.learning_rate, model.dtype; go on from an earlier checkpoint",
    )


def _compare_counters(step: RecordedStep, moment: str, path: Path) -> Comparison:
    from megatron_r1.why.policy import checkpoint_model

    name = f"Adam's counter {moment}"
    counter = checkpoint_model.read_state(path)
    num_updates = step.updates_after(step.step - (moment == "before"))
    if counter is None:
        return not_checked(FAMILY_BY_CHECKPOINT[moment], name, f"{path.name} has none")
    subject = f"{counter:,} of {path.name} with {num_updates:,} updates"
    if counter == num_updates:
        return Comparison(FAMILY_BY_CHECKPOINT[moment], name, EQUAL, subject, 0.0, 0.0, "exact")
    reason, remedy = _missing_updates(step) or (
        "Adam's state was lost on the way",
        "the checkpoint that the run went on from: it was loaded without its optimizer",
    )
    return Comparison(
        FAMILY_BY_CHECKPOINT[moment],
        name,
        DEPARTS,
        subject,
        float(abs(counter - num_updates)),
        0.0,
        "exact",
        f"{path.name} counts {counter:,} updates, {num_updates:,} were made: {reason}",
        remedy=remedy,
    )


def _missing_updates(step: RecordedStep) -> tuple[str, str] | None:
    """Return which updates the step lacks by the counters of both checkpoints, and what to change.
    None where it lacks none, or a checkpoint is not there."""
    from megatron_r1.why.policy import checkpoint_model

    counters = [
        checkpoint_model.read_state(path)
        for path in (step.checkpoint_before, step.checkpoint_after)
        if path is not None and (path / ".metadata").is_file()
    ]
    known_counters = [counter for counter in counters if counter is not None]
    if len(known_counters) < 2:
        return None
    before, after = known_counters
    num_counted = after - before
    num_due = step.updates_after(step.step) - step.updates_after(step.step - 1)
    if num_counted == 0:
        return (
            f"the counter stands still at {after:,}",
            "the optimizer: Adam's bias correction is that of another update (step_taken in "
            "metrics.jsonl says whether updates were made)",
        )
    if num_counted < num_due:
        return (
            f"the step made {num_counted:,} of the {num_due:,} updates, the others were skipped",
            "the trainer: each mini-batch makes one optimizer step (step_taken in metrics.jsonl)",
        )
    return None


def _compare_moments(step: RecordedStep, moment: str, path: Path) -> Comparison:
    from megatron_r1.why.policy import checkpoint_tensors

    name = f"Adam's moments {moment}"
    num_updates = step.updates_after(step.step - (moment == "before"))
    if not num_updates:
        return not_checked(FAMILY_BY_CHECKPOINT[moment], name, "no update was made before")
    # The first gradient of A is 0, as B is.
    is_first = num_updates == 1 and step.run_config.model.lora is not None
    empty_names, num_parameters = checkpoint_tensors.empty_moments(path, A if is_first else "")
    if not num_parameters:
        return not_checked(FAMILY_BY_CHECKPOINT[moment], name, f"{path.name} has no moments")
    fraction = len(empty_names) / num_parameters
    return Comparison(
        FAMILY_BY_CHECKPOINT[moment],
        name,
        DEPARTS if fraction > 0.5 else EQUAL,
        f"{num_parameters - len(empty_names):,} of {num_parameters:,} second moments of "
        f"{path.name} are not all zero",
        fraction,
        0.5,
        "parameters without a gradient have none",
        f"{len(empty_names):,} of {num_parameters:,} second moments of {path.name} are zero, as "
        f"{empty_names[0]}"
        if empty_names
        else "",
        remedy="the checkpoint's optimizer state: it was lost, or parameters get no gradient",
    )


def _compare_masters(step: RecordedStep, moment: str, path: Path) -> Comparison:
    from megatron_r1.why.policy import checkpoint_tensors

    name = f"master weights {moment}"
    worst_name, distance = checkpoint_tensors.masters_apart(path)
    tolerance = 0.0 if step.run_config.model.dtype == "float32" else 2.0**-8
    if not worst_name:
        return not_checked(FAMILY_BY_CHECKPOINT[moment], name, f"{path.name} has none")
    return Comparison(
        FAMILY_BY_CHECKPOINT[moment],
        name,
        EQUAL if distance <= tolerance else DEPARTS,
        f"weights of {path.name} with the optimizer's",
        distance,
        tolerance,
        "rounding of model.dtype",
        f"{worst_name} is not the optimizer's: the next update would undo it",
        remedy=f"{path}: its weights were changed after the update",
    )


def _compare_tied_head(step: RecordedStep) -> Comparison:
    """Check that a tied head is the embedding in the checkpoints."""
    from megatron_r1.why.policy import checkpoint_tensors

    name = "tied head"
    path = step.checkpoint_before
    if not step.hf_config.get("tie_word_embeddings"):
        return not_checked(CHECKPOINT, name, "tie_word_embeddings: false")
    if path is None or not (path / ".metadata").is_file():
        return not_checked(CHECKPOINT, name, "there is no checkpoint")
    distance = checkpoint_tensors.head_from_embedding(path)
    return Comparison(
        CHECKPOINT,
        name,
        EQUAL if not distance else DEPARTS,
        f"output_layer of {path.name}, if there is one, with its embedding",
        distance or 0.0,
        0.0,
        "one tensor",
        "the head is another tensor than the embedding, though tie_word_embeddings is true",
        remedy="parallel.pipeline: first and last stage hold copies that parted; or config.json",
    )


def _compare_size_of_change(
    step: RecordedStep, parameter: str, largest_change: float, norm: float
) -> Comparison:
    """Check that the weights moved, and not further than Adam can."""
    rates = step.learning_rates
    limit = MAX_STEP_FACTOR * sum(rates)
    rate = max(rates)
    is_still = largest_change == 0 and rate > 0 and bool(step.metrics_row.get("grad_norm"))
    return Comparison(
        FAMILY,
        "size of the change",
        DEPARTS if is_still or largest_change > limit else EQUAL,
        f"the largest change of a weight, of a norm of {format_number(norm)}, with "
        f"{MAX_STEP_FACTOR:g} x the learning rates",
        largest_change,
        limit,
        "Adam's largest steps, with a margin",
        "no weight changes, though there is a gradient"
        if is_still
        else f"a number of {parameter} moves by {format_number(largest_change)}, "
        f"{largest_change / sum(rates):,.0f} learning rates",
        remedy="optimizer: weights that stay are frozen, or not those that are trained"
        if is_still
        else "optimizer.learning_rate as it was used; the checkpoints: they are of other runs",
    )
