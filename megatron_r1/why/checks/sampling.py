"""Compares how the step was sampled (settings, limits, weight versions and kept tokens that engines
logged) with what the run's settings say."""

from __future__ import annotations

from collections import Counter

import numpy as np

from megatron_r1.why.checks.draws import compare_draws
from megatron_r1.why.comparison import (
    Comparison,
    ResponseIndex,
    fraction_comparison,
    not_checked,
)
from megatron_r1.why.record.recorded_step import RecordedStep

FAMILY = "sampling"


def compare_sampling(step: RecordedStep) -> list[Comparison]:
    """Return the comparisons of what was logged of the sampling."""
    comparisons = [_compare_kept_tokens(step)] if step.config.rollout.uses_sampling_mask else []
    return [
        _compare_settings(step),
        _compare_limits(step),
        _compare_versions(step),
        compare_draws(step, FAMILY),
        *comparisons,
    ]


def _compare_settings(step: RecordedStep) -> Comparison:
    """Check what the engines were asked for."""
    name = "settings of the engines"
    rollout = step.config.rollout
    expected_settings = {
        "temperature": rollout.temperature,
        "top_p": rollout.top_p,
        "top_k": rollout.top_k,
        "min_p": rollout.min_p,
        "max_tokens": rollout.max_response_tokens,
        "stop_token_ids": tuple(step.tokenizer.stop_token_ids),
        "stop": tuple(rollout.stop),
    }
    keys = {
        "max_tokens": "rollout.max_response_tokens",
        "stop_token_ids": "rollout.stop_token_ids, or the model's end tokens",
    }
    departing_responses: list[ResponseIndex] = []
    difference_counts: Counter[str] = Counter()
    num_logged = 0
    for group_index, (group, record) in enumerate(
        zip(step.groups + step.filtered_groups, step.sampling, strict=True)
    ):
        if record is None:
            continue
        num_logged += 1
        names = [key for key, value in expected_settings.items() if getattr(record, key) != value]
        if step.run_config.agents.player_settings:
            names = [key for key in names if key != "max_tokens"]
        difference_counts.update(
            f"{key} {getattr(record, key)} was asked for, the settings say {expected_settings[key]}"
            for key in names
        )
        if names and group_index < len(step.groups):
            departing_responses += ((group_index, index) for index in range(len(group.responses)))
    if not num_logged:
        return not_checked(
            FAMILY, name, "the log is of a version that did not write them down (before 0.3)"
        )
    reason = "; ".join(text for text, _ in difference_counts.most_common(3))
    key = reason.partition(" ")[0]
    return fraction_comparison(
        FAMILY,
        name,
        f"temperature, cut, limit and stops of {num_logged:,} groups with the settings",
        departing_responses,
        len(step.responses),
        reason=reason,
        remedy=keys.get(key, f"rollout.{key}" if key else ""),
        loss_fraction=step.loss_fraction,
    )


def _compare_limits(step: RecordedStep) -> Comparison:
    """Check that responses that were cut off have as many tokens as the limit."""
    rollout = step.config.rollout
    limit = rollout.max_response_tokens
    cut_lengths = {
        index: len(graded.response.token_ids)
        for index, graded in step.responses.items()
        if graded.is_truncated and graded.episode is None
    }
    shorter_lengths = {
        index: count for index, count in cut_lengths.items() if count < step.response_limit(index)
    }
    longer_responses = [
        index
        for index, graded in step.responses.items()
        if graded.episode is None and len(graded.response.token_ids) > limit
    ]
    longest = max(shorter_lengths.values(), default=0)
    reason = (
        f"{len(shorter_lengths):,} responses are cut off at {longest:,} tokens at most, "
        "the limit is "
    )
    if longer_responses:
        reason = f"{len(longer_responses):,} responses are longer than the limit, "
    return fraction_comparison(
        FAMILY,
        "limit of the response",
        f"{len(cut_lengths):,} responses that are cut off with the limit of {limit:,} tokens",
        [*shorter_lengths, *longer_responses],
        len(step.responses),
        reason=f"{reason}{limit:,}",
        remedy="rollout.max_response_tokens, or what the engine makes of it (rollout.vllm)",
        loss_fraction=step.loss_fraction,
    )


def _compare_versions(step: RecordedStep) -> Comparison:
    """Check that the policy that sampled is not older than rl.staleness allows."""
    newest_version = step.step - 1
    oldest_version = newest_version - step.config.rl.staleness
    departing_responses: dict[ResponseIndex, None] = {}
    engines: Counter[str] = Counter()
    wrong_versions: Counter[int] = Counter()
    num_tokens = 0
    for sequence in step.sequences:
        is_wrong = (sequence.versions < oldest_version) | (sequence.versions > newest_version)
        if is_wrong.any():
            departing_responses[sequence.response] = None
            engines[step.responses[sequence.response].response.engine or "an engine"] += 1
            wrong_versions.update(sequence.versions[is_wrong].tolist())
            num_tokens += int(is_wrong.sum())
    reason = ""
    if departing_responses:
        (version, _), *_ = wrong_versions.most_common(1)
        names = ", ".join(name for name, _ in engines.most_common(4))
        reason = f"{names} sampled with version {version}, the step trains version {newest_version}"
    return fraction_comparison(
        FAMILY,
        "version of the weights",
        f"the versions of all tokens with {oldest_version} to {newest_version}",
        list(departing_responses),
        len(step.responses),
        reason=reason,
        remedy="the engine that is behind: its log in logs/, push/* in metrics.jsonl "
        "(docs/push.md); or rl.staleness",
        loss_fraction=step.loss_fraction,
        num_tokens=num_tokens,
    )


def _compare_kept_tokens(step: RecordedStep) -> Comparison:
    """Check that every token is among those that its engine kept of the vocabulary."""
    departing_responses: dict[ResponseIndex, None] = {}
    num_tokens = 0
    for sequence in step.sequences:
        sampled_ids = sequence.token_ids[sequence.is_sampled]
        is_kept = np.zeros(len(sampled_ids), bool)
        if sequence.kept_ids is not None:
            is_kept = sequence.kept_ids.contains(sampled_ids)
        if not is_kept.all():
            departing_responses[sequence.response] = None
            num_tokens += int((~is_kept).sum())
    return fraction_comparison(
        FAMILY,
        "tokens that the engines kept",
        "every sampled token with the ids that its engine drew it from",
        list(departing_responses),
        len(step.responses),
        reason=f"{num_tokens:,} tokens are not among the ids that were kept for them",
        remedy="rollout.top_k and the engine's --return-sampling-mask (docs/engines.md)",
        loss_fraction=step.loss_fraction,
        num_tokens=num_tokens,
    )
