"""Majority vote over several answers to one question (cons@N), by what the answers mean."""

import asyncio
import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from r1_grading import RewardPool, read_answer
from r1_grading.reading import Reading, is_number, unwrap_answer
from r1_grading.rewards import ENVIRONMENT
from r1_grading.terms import Gradable

EQUIVALENCE = "r1_grading.math:grade_equivalence"
MAX_COMPARED_CHARS = 1_000
"""Longer answers are the same only if their texts are."""
VOTED_NUMBER = re.compile(
    r"[+-]?(?:[0-9]{1,300}|[0-9]{1,3}(?:,[0-9]{3}){1,99})(?:\.[0-9]{1,300}|/[0-9]{1,300})?"
)
"""A number as it is written, without exponents: Fraction("1e999999999") would never return."""
CORRECT_GROUP = -1
"""The group of the answers that equal the truth."""


@dataclass(frozen=True)
class Vote:
    """A response's final answer.

    Attributes:
        key: equal for the same number, and for the same text without decoration and case.
        text: as written, for comparisons by meaning; "" for a text too long to compare, whose key
            is a digest."""

    key: str | Fraction
    text: str


def can_vote(kind: str) -> bool:
    """Return whether responses of this kind end in an answer that can be compared."""
    return kind not in ("code", ENVIRONMENT)


def read_vote(
    response: str,
    thought_opened: bool = False,
    reading: Reading = "strict",
    *,
    kind: str = "",
    truth_is_number: bool = False,
) -> Vote | None:
    """Return the vote of a response; None without an answer.

    The answer is read as the reward `kind` reads it, by `r1_grading.read_answer`.

    Args:
        response: the text that the model sampled.
        thought_opened: as for `read_answer`.
        reading: as for `read_answer`.
        kind: the question's reward.
        truth_is_number: whether the truth is one number."""
    answer = read_answer(
        response,
        reading,
        thought_opened=thought_opened,
        reads_last_line=kind == "math",
        numeric=truth_is_number,
    ).text
    if answer is None:
        return None
    text = unwrap_answer(answer)
    compact = "".join(text.split()).lower()
    if VOTED_NUMBER.fullmatch(compact):
        try:
            return Vote(Fraction(compact.replace(",", "")), text)
        except ZeroDivisionError:
            pass
    if len(text) > MAX_COMPARED_CHARS:
        return Vote(hashlib.sha256(compact.encode("utf-8", "replace")).hexdigest(), "")
    return Vote(compact, text)


def expects_number(prompt: Gradable) -> bool:
    """Return whether the truth of a prompt of mathematics or logic is one number, as their rewards
    decide it. In mathematics `$13$` is one too, and a whole solution that ends in `#### 13`."""
    truth = prompt.truth
    if prompt.kind == "math":
        truth = unwrap_answer(str(truth))
    elif prompt.kind == "logic":
        truth = prompt.fields.get("entry", {}).get("answer")
    return is_number(truth)


async def group_answers(
    pool: RewardPool, kind: str, votes: Sequence[Vote | None], rewards: Sequence[float]
) -> list[int | None]:
    """Return the group of each sample's answer, [samples]; None for a sample without a vote.

    Answers are first compared as exact numbers and as texts. For kind "math" they are then compared
    by meaning, in the pool's workers; the rewards save some of these comparisons: right answers are
    equal to each other (group `CORRECT_GROUP`) and to no wrong one. Other kinds are compared by
    number and text only: a puzzle may have many right answers.

    Args:
        pool: the workers that compare.
        kind: the question's reward.
        votes: [samples].
        rewards: [samples]."""
    if kind != "math":
        first_with = {vote.key: i for i, vote in reversed(list(enumerate(votes))) if vote}
        return [first_with[vote.key] if vote else None for vote in votes]
    incorrect_votes: dict[str | Fraction, Vote] = {}
    for vote, reward in zip(votes, rewards, strict=True):
        if vote and reward != 1.0:
            incorrect_votes.setdefault(vote.key, vote)
    group_of = await _meaning_groups(pool, list(incorrect_votes.values()))
    return [
        (CORRECT_GROUP if reward == 1.0 else group_of[vote.key]) if vote else None
        for vote, reward in zip(votes, rewards, strict=True)
    ]


def majority_index(groups: Sequence[object | None]) -> int | None:
    """Return the index of the first sample of the largest group; None without any vote. A tie goes
    to the group whose answer came first."""
    counts = Counter(group for group in groups if group is not None)
    if not counts:
        return None
    return list(groups).index(counts.most_common(1)[0][0])


def voted_reward(groups: Sequence[int | None], rewards: Sequence[float]) -> float:
    """Return the reward of the largest group's answer; 0 without any vote."""
    winner = majority_index(groups)
    return 0.0 if winner is None else rewards[winner]


async def majority_reward(
    pool: RewardPool,
    kind: str,
    responses: Sequence[str],
    rewards: Sequence[float],
    thought_opened: bool = False,
    reading: Reading = "strict",
    *,
    truth_is_number: bool = False,
) -> float:
    """Return the reward of the majority's answer, which cons@N averages; 0 without any vote.

    Answers are compared by meaning only if that can change the outcome: for mathematics, if some
    answer is right and the wrong answers together could outvote it.

    Args:
        pool: grades responses and compares answers.
        kind: the question's reward.
        responses: the texts sampled for one question.
        rewards: their rewards.
        thought_opened: as for `read_vote`.
        reading: as for `read_vote`.
        truth_is_number: as for `read_vote`."""
    votes = [
        read_vote(text, thought_opened, reading, kind=kind, truth_is_number=truth_is_number)
        for text in responses
    ]
    if kind == "math":
        num_votes = sum(vote is not None for vote in votes)
        pairs = zip(votes, rewards, strict=True)
        num_correct = sum(vote is not None and reward == 1.0 for vote, reward in pairs)
        if num_correct == 0 or 2 * num_correct > num_votes:
            return float(num_correct > 0)
    return voted_reward(await group_answers(pool, kind, votes, rewards), rewards)


async def _meaning_groups(pool: RewardPool, votes: Sequence[Vote]) -> dict[str | Fraction, int]:
    """Return key → group of distinct answers: each joins the first earlier one of equal meaning.
    Answers whose comparison runs out of time or memory count as different."""
    representatives: list[Vote] = []
    groups: dict[str | Fraction, int] = {}
    for vote in votes:
        candidates = [candidate for candidate in representatives if _may_be_same(candidate, vote)]
        grades = await asyncio.gather(
            *(pool.grade(EQUIVALENCE, vote.text, candidate.text) for candidate in candidates)
        )
        equal_answers = [
            o for o, grade in zip(candidates, grades, strict=True) if grade.reward == 1.0
        ]
        if equal_answers:
            groups[vote.key] = groups[equal_answers[0].key]
        else:
            groups[vote.key] = len(representatives)
            representatives.append(vote)
    return groups


def _may_be_same(left: Vote, right: Vote) -> bool:
    are_numbers = isinstance(left.key, Fraction) and isinstance(right.key, Fraction)
    if are_numbers and "." not in left.text + right.text:
        return False  # exact and different; decimals may be the same to six places
    return bool(left.text and right.text)
