"""Whether enough of a rollout's responses have a grade."""

from __future__ import annotations

import math
from collections import Counter

from r1_grading.terms import ACCURACY

from megatron_r1.base.errors import Cause, RunError, UserError
from megatron_r1.controller.rollouts.rollout import Group, all_responses


def check_grades(groups: list[Group], max_ungraded: float) -> None:
    """Check the grades of everything that was sampled for one purpose.

    Raises:
        UserError: one reward failed on every response: one may break a grader, but not all.
        RunError: a larger share of them than `max_ungraded` could not be graded: the policy would
            be trained on those that are easy to grade.
    """
    responses = all_responses(groups)
    if not responses:
        return
    faults = Counter(r.episode.status for r in responses if r.episode and not r.episode.has_reward)
    broken_terms = set.intersection(*(set(graded.ungraded_terms) for graded in responses))
    if broken_terms and not faults:
        term = min(broken_terms)
        names = {group.prompt.kind for group in groups} if term == ACCURACY else {term}
        raise UserError(
            f"reward {', '.join(map(repr, sorted(names)))} failed on all {len(responses)} "
            f"responses: {responses[0].reason}; "
            "repair it, its rewards.options, or leave it out of rewards.weights",
            key="kind" if term == ACCURACY else f"rewards.weights.{term}",
            cause=Cause.FAILED,
        )
    ungraded_responses = [graded for graded in responses if not graded.is_graded]
    num_allowed = math.ceil(max_ungraded * len(responses))
    if len(ungraded_responses) > num_allowed:
        fault_counts = ", ".join(f"{count} {status}" for status, count in faults.most_common())
        raise RunError(
            f"{len(ungraded_responses)} of {len(responses)} "
            f"{'episodes' if faults else 'responses'} could not be "
            f"graded{f' ({fault_counts})' if fault_counts else ''}, at most {num_allowed} may be "
            f"(rewards.max_ungraded: {max_ungraded:g}); the first: {ungraded_responses[0].reason}. "
            f"Repair the {'environment' if faults else 'reward'} or raise that setting; the same "
            "command continues"
        )
