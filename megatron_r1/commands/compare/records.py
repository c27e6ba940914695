"""Compares what two runs wrote down of a step: the finished groups of the sample log, and the line
of metrics.jsonl.

**Equal to rounding.** Sums in another order differ by rounding: relatively by the unit roundoff of
their dtype (2^-24 in float32, 2^-8 in bfloat16) times the root of the number of terms, and more
where terms cancel, as in gradients. The distance of two tensors is |a - b| / |a| in the Euclidean
norm, that of two numbers |a - b| / max(|a|, |b|), that of two log-probabilities |a - b|. Up to
`ROUNDING_BY_DTYPE` (of `why.comparison`) it counts as rounding, a choice for which docs/compare.md
has measurements. Texts, integers and missing values are never equal to rounding."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.base.files.framed_records import FramedFile
from megatron_r1.commands.compare.difference import RunDifference
from megatron_r1.controller.rollouts.group_records import GroupRecord, ResponseRecord, decode
from megatron_r1.reporting.formatting import format_count
from megatron_r1.why.comparison import ROUNDING_BY_DTYPE

MAX_NAMED = 5
"""As many groups that cannot be compared are named."""


def relative_difference(first: float, second: float) -> float:
    """Return |a - b| / max(|a|, |b|); infinite where only one of them is finite."""
    if first == second or (math.isnan(first) and math.isnan(second)):
        return 0.0
    if not (math.isfinite(first) and math.isfinite(second)):
        return math.inf
    return abs(first - second) / max(abs(first), abs(second))


def is_rounding(distance: float, dtype: str) -> bool:
    """Return whether a relative distance is rounding in the dtype that the runs compute in.

    Args:
        distance: as `RunDifference.distance`.
        dtype: "float32" or "bfloat16"."""
    return distance <= ROUNDING_BY_DTYPE[dtype]


UNCOMPARED_METRICS = (
    "time/",
    "tokens_per_second",
    "checkpoint/",
    "engines/",
    "trainer/",
    "packing/",
    "memory/",
    "push/",
    "groups/restored",
    "rewards/busy",
    "rewards/most_outstanding",
    "nonfinite",
)
"""Beginnings of the names of metrics that equal runs need not share: times, what a restart leaves,
and what depends on the layout."""
PHASE_OF = {
    **{"reward/": "rewards", "accuracy": "rewards", "response_length/": "responses"},
    **{"grad_norm": "gradient", "step_taken": "gradient", "learning_rate": "update"},
}
"""Phase of metrics by the beginning of their names; that of others is training."""


@dataclass(frozen=True)
class LoggedGroups:
    """The groups that were read of a step's log.

    Attributes:
        path: the file.
        groups: the whole ones by position.
        num_damaged_bytes: bytes of the file that belong to no whole record."""

    path: Path
    groups: Mapping[int, GroupRecord]
    num_damaged_bytes: int


def read_groups(path: Path) -> LoggedGroups | None:
    """Return the groups of a step's log; None where there is no file.

    Raises:
        UserError: the records are of another version of this program.
    """
    if not path.is_file():
        return None
    file = FramedFile.read(path, repair=False)
    try:
        records = [decode(payload) for payload in file]
    except msgspec.MsgspecError as error:
        raise UserError(
            f"{path}: written by another version of this program ({error}); compare runs of one",
            key=path.name,
            cause=Cause.CHANGED,
        ) from None
    groups = {record.prompt_index: record for record in records if isinstance(record, GroupRecord)}
    return LoggedGroups(path, groups, file.num_damaged_bytes)


def missing_groups(first: LoggedGroups, second: LoggedGroups) -> list[str]:
    """Return a line per log that lacks groups of the other and has damaged bytes.

    Damaged bytes alone are no loss: a run that continues samples a damaged group again."""
    lines = []
    for log, other_log in ((first, second), (second, first)):
        missing = sorted(other_log.groups.keys() - log.groups.keys())
        is_empty = not (log.groups or other_log.groups)
        if log.num_damaged_bytes and (missing or is_empty):
            missing_positions = ", ".join(map(str, missing[:MAX_NAMED])) or "any"
            lines.append(
                f"{log.path}: {log.num_damaged_bytes:,} bytes belong to no whole record, so "
                f"{format_count(len(missing), 'group')} ({missing_positions}) cannot be compared"
            )
    return lines


def compare_groups(
    step: int, first: LoggedGroups, second: LoggedGroups, dtype: str, is_damaged: bool = False
) -> list[RunDifference]:
    """Return the first difference of each phase of a step's rollout.

    Args:
        step: the training step.
        first: the log of one run.
        second: that of the other.
        dtype: what log-probabilities are computed in.
        is_damaged: groups that one log lacks are damaged in it, and no difference of the runs."""
    first_by_phase: dict[str, RunDifference] = {}
    positions = first.groups.keys() | second.groups.keys()
    if is_damaged:
        positions = first.groups.keys() & second.groups.keys()
    for position in sorted(positions):
        a, b = first.groups.get(position), second.groups.get(position)
        if a is None or b is None:
            values = ("none" if group is None else group.prompt_id for group in (a, b))
            differences = [_exact_difference(step, "questions", f"group {position}", *values)]
        else:
            differences = list(_group_differences(step, position, a, b, dtype))
        for difference in differences:
            previous = first_by_phase.get(difference.phase)
            if previous is None or (previous.is_rounding and not difference.is_rounding):
                first_by_phase[difference.phase] = difference
    return list(first_by_phase.values())


def _group_differences(
    step: int, position: int, first: GroupRecord, second: GroupRecord, dtype: str
) -> Iterator[RunDifference]:
    group_name = f"group {position}"
    if first.prompt_id != second.prompt_id:
        yield _exact_difference(step, "questions", group_name, first.prompt_id, second.prompt_id)
        return
    if first.prompt_ids != second.prompt_ids:
        prompts = [np.frombuffer(group.prompt_ids, "<i4") for group in (first, second)]
        token_index = _first_difference(*prompts)
        name = f"{group_name}, token {token_index} of the prompt"
        yield _exact_difference(
            step, "questions", name, *(_token_text(prompt, token_index) for prompt in prompts)
        )
        return
    for index, (a, b) in enumerate(zip_longest(first.responses, second.responses)):
        name = f"{group_name}, response {index}"
        if a is None or b is None:
            values = ("none" if group is None else "there" for group in (a, b))
            yield _exact_difference(step, "responses", name, *values)
        elif a != b:
            yield from _response_differences(step, name, a, b, dtype)


def _response_differences(
    step: int, name: str, first: ResponseRecord, second: ResponseRecord, dtype: str
) -> Iterator[RunDifference]:
    a, b = (np.frombuffer(response.token_ids, "<i4") for response in (first, second))
    is_same = first.token_ids == second.token_ids
    token_index = len(a) if is_same else _first_difference(a, b)
    # Tokens after the first that differs follow another text.
    first_logprobs, second_logprobs = (
        np.frombuffer(response.logprobs, "<f4")[:token_index] for response in (first, second)
    )
    if not np.array_equal(first_logprobs, second_logprobs):
        yield _compare_logprobs(step, name, first_logprobs, second_logprobs, dtype)
    if not is_same:
        tokens = (_token_text(token_ids, token_index) for token_ids in (a, b))
        yield _exact_difference(step, "responses", f"{name}, token {token_index}", *tokens)
        return
    if first.finish_reason != second.finish_reason:
        ends = first.finish_reason, second.finish_reason
        yield _exact_difference(step, "responses", f"{name}, finish_reason", *ends)
    if first.policy_versions != second.policy_versions:
        versions = [np.frombuffer(response.policy_versions, "<i4") for response in (first, second)]
        version_texts = (
            f"version {policy_versions.max(initial=-1)}" for policy_versions in versions
        )
        yield _exact_difference(step, "responses", f"{name}, policy_version", *version_texts)
    if first.reward != second.reward or first.rewards != second.rewards:
        terms = [
            term
            for term in first.rewards.keys() | second.rewards.keys()
            if first.rewards.get(term) != second.rewards.get(term)
        ]
        values = (f"{first.reward:g}", f"{second.reward:g}")
        distance = relative_difference(first.reward, second.reward)
        terms_text = f" by {', '.join(sorted(terms))}" if terms else ""
        yield RunDifference(step, "rewards", f"{name}{terms_text}", values, distance)
    for field in ("routing", "sampling_mask", "teacher_logprobs"):
        if getattr(first, field) != getattr(second, field):
            yield _exact_difference(step, "responses", f"{name}, {field}", "one", "another")


def _compare_logprobs(
    step: int, name: str, a: np.ndarray, b: np.ndarray, dtype: str
) -> RunDifference:
    """Return the difference at the token where two log-probabilities are furthest apart.

    Their difference is the relative distance of the probabilities, which rounding bounds.

    Args:
        step: the training step.
        name: the response, for the user.
        a: log-probabilities of one run.
        b: those of the other.
        dtype: what they are computed in."""
    gaps = np.abs(a.astype(np.float64) - b)
    gaps[np.isnan(gaps)] = math.inf
    token_index = int(gaps.argmax())
    distance = float(gaps[token_index])
    values = (f"{a[token_index]:.9g}", f"{b[token_index]:.9g}")
    return RunDifference(
        step,
        "engine log-probabilities",
        f"{name}, token {token_index}",
        values,
        distance,
        is_rounding(distance, dtype),
        f"{int((gaps > 0).sum()):,} of {len(gaps):,} tokens",
    )


def compare_metrics(
    step: int, first: Mapping[str, Any], second: Mapping[str, Any], dtype: str
) -> list[RunDifference]:
    """Return the metrics of a step that differ, of each phase the one with the largest distance.

    Args:
        step: the training step.
        first: the line of one run.
        second: the line of the other.
        dtype: what the runs compute in."""
    first_by_phase: dict[str, RunDifference] = {}
    for name in sorted(first.keys() | second.keys()):
        if name.startswith(UNCOMPARED_METRICS) or first.get(name) == second.get(name):
            continue
        a, b = first.get(name), second.get(name)
        if isinstance(a, int | float) and isinstance(b, int | float):
            distance, values = relative_difference(a, b), (f"{a:.9g}", f"{b:.9g}")
        else:
            distance, values = math.inf, (str(a), str(b))
        phase = next((PHASE_OF[start] for start in PHASE_OF if name.startswith(start)), "training")
        previous = first_by_phase.get(phase)
        if previous is None or previous.distance < distance:
            rounding = is_rounding(distance, dtype)
            first_by_phase[phase] = RunDifference(step, phase, name, values, distance, rounding)
    return list(first_by_phase.values())


def _exact_difference(step: int, phase: str, name: str, first: str, second: str) -> RunDifference:
    return RunDifference(step, phase, name, (first, second), math.inf)


def _first_difference(a: np.ndarray, b: np.ndarray) -> int:
    num_shared = min(len(a), len(b))
    indices = np.flatnonzero(a[:num_shared] != b[:num_shared])
    return int(indices[0]) if len(indices) else num_shared


def _token_text(token_ids: np.ndarray, index: int) -> str:
    return str(token_ids[index]) if index < len(token_ids) else "its end"
