"""Pairs on which a reward model is trained: two responses to a question, one preferred by a judge.

pairs.jsonl has the responses, which one is preferred and by how many votes.

DeepSeek-R1's helpful reward model is trained on 66 thousand pairs: each judged four times in
alternating order, near-ties dropped, chosen and rejected of comparable length over the whole set
(arXiv 2501.12948 v2, section 3.1 and supplement B.3). "Comparable" is here that the mean of

    d = log(length of chosen / length of rejected)

is near 0. A Bradley-Terry model whose only feature is the log of the length, with weight w, has
the convex loss -Σ log sigmoid(w d), with slope -½ Σ d at w = 0. So at a mean of 0 it learns
nothing."""

import asyncio
import bisect
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from r1_grading.remote.judge import PairVotes
from r1_grading.remote.service import Ungradable

from megatron_r1.config.sample import PairsConfig
from megatron_r1.data.prompt import Prompt
from megatron_r1.evaluation.response import TextResponse
from megatron_r1.sample.response_judges import ResponseJudge
from megatron_r1.sample.second_pass import PromptResult
from megatron_r1.sample.selection import (
    CHOSEN,
    REJECTED,
    UNGRADED_CODE,
    Decision,
    Selection,
)

PairId = tuple[str, int, int]
"""Prompt id and the indices of the two responses."""


class PreferencePairs:
    """Compares a question's responses in pairs.

    Attributes:
        log_ratios: log(chosen / rejected) of the lengths, for every pair with a winner.
        dropped_pairs: the pairs that `balance`, called when all pairs are known, leaves out."""

    def __init__(self, selection: Selection, settings: PairsConfig, judge: ResponseJudge) -> None:
        """Begin without a pair.

        Args:
            selection: drops responses before they are paired.
            settings: the section `sample.pairs`.
            judge: compares two responses."""
        self._selection, self._settings, self._judge = selection, settings, judge
        self.log_ratios: dict[PairId, float] = {}
        self.dropped_pairs: set[PairId] = set()
        self._failed_comparisons: dict[tuple[str, str, str], Ungradable] = {}
        """Pairs that the judge could not compare. They are not judged again: a pair that succeeded
        in the second pass would not be balanced."""

    async def __call__(self, prompt: Prompt, responses: Sequence[TextResponse]) -> PromptResult:
        """Return the pairs of preferred and refused responses to one prompt."""
        decisions = await self._selection.drop_reasons(prompt, responses)
        by_index = {r.index: r for r in responses if r.index not in decisions}
        texts: dict[int, str] = {}
        for index, response in by_index.items():
            text = response.part(self._settings.part)
            if text is None:
                decisions[index] = Decision("no_summary", "nothing follows its thought")
            else:
                texts[index] = text
                decisions[index] = Decision("unpaired", "another pair was nearer in length")
        pairs = make_pairs({i: len(text) for i, text in texts.items()}, self._settings.per_prompt)
        outcomes = await asyncio.gather(
            *(self._compare_responses(prompt.question, texts[i], texts[j]) for i, j in pairs)
        )
        rows = []
        for (i, j), outcome in zip(pairs, outcomes, strict=True):
            decided, row = self._decide_pair(prompt, by_index[i], by_index[j], texts, outcome)
            decisions |= decided
            rows += row
        return PromptResult([decisions[response.index] for response in responses], rows)

    def balance(self) -> None:
        """Drop pairs until the mean log ratio is within `max_length_bias`."""
        if self._settings.max_length_bias is not None:
            self.dropped_pairs = pairs_to_drop(self.log_ratios, self._settings.max_length_bias)

    def length_bias(self) -> dict[str, float | int]:
        """Return the mean of log(chosen / rejected) over all pairs with a winner, and after
        balancing."""
        log_ratios = [d for pair, d in self.log_ratios.items() if pair not in self.dropped_pairs]
        means = [
            math.fsum(ds) / len(ds) if ds else 0.0 for ds in (self.log_ratios.values(), log_ratios)
        ]
        return {"pairs": len(log_ratios), "length_bias_before": means[0], "length_bias": means[1]}

    async def _compare_responses(
        self, question: str, first: str, second: str
    ) -> PairVotes | Ungradable:
        texts = (question, first, second)
        if texts not in self._failed_comparisons:
            try:
                return await self._judge.compare(*texts)
            except Ungradable as error:
                self._failed_comparisons[texts] = error
        return self._failed_comparisons[texts]

    def _decide_pair(
        self,
        prompt: Prompt,
        first: TextResponse,
        second: TextResponse,
        texts: dict[int, str],
        outcome: PairVotes | Ungradable,
    ) -> tuple[dict[int, Decision], list[dict[str, Any]]]:
        """Return the decisions by index, and the row of a pair with a winner."""
        indices = (first.index, second.index)
        if isinstance(outcome, Ungradable):
            return dict.fromkeys(indices, Decision(UNGRADED_CODE, str(outcome))), []
        votes = f"{outcome.wins} : {outcome.losses}, {outcome.ties} ties"
        winner = outcome.winner(self._settings.margin)
        if winner is None:
            code = "tie" if outcome.preference == 0.5 else "near_tie"
            reason = f"response {first.index} against {second.index}: {votes}"
            return dict.fromkeys(indices, Decision(code, reason)), []
        chosen, rejected = (first, second) if winner == 0 else (second, first)
        pair = (prompt.id, *indices)
        self.log_ratios[pair] = log_ratio(texts[chosen.index], texts[rejected.index])
        reason = f"response {chosen.index} over {rejected.index}: {votes}"
        if pair in self.dropped_pairs:
            return dict.fromkeys(indices, Decision("length_balance", reason)), []
        lost, won = sorted((outcome.wins, outcome.losses))
        row = {
            "question": prompt.question,
            "chosen": chosen.full_text,
            "rejected": rejected.full_text,
            "votes": {"chosen": won, "rejected": lost, "ties": outcome.ties},
            "id": prompt.id,
        }
        return {
            chosen.index: Decision(CHOSEN, reason),
            rejected.index: Decision(REJECTED, reason),
        }, [row]


def make_pairs(lengths: dict[int, int], num_pairs: int) -> list[tuple[int, int]]:
    """Return at most `num_pairs` disjoint pairs of responses.

    Each pair in turn is the one with the smallest ratio of lengths among the responses that are
    left; ties go to the smaller indices.

    Args:
        lengths: index → length.
        num_pairs: the most pairs."""
    distance = {
        (i, j): abs(math.log(max(1, lengths[i]) / max(1, lengths[j])))
        for i, j in itertools.combinations(sorted(lengths), 2)
    }
    pairs: list[tuple[int, int]] = []
    used_indices: set[int] = set()
    for pair in sorted(distance, key=lambda pair: (distance[pair], pair)):
        if len(pairs) < num_pairs and used_indices.isdisjoint(pair):
            pairs.append(pair)
            used_indices.update(pair)
    return pairs


def log_ratio(chosen: str, rejected: str) -> float:
    """Return d from lengths in characters; an empty text counts as one character."""
    return math.log(max(1, len(chosen)) / max(1, len(rejected)))


def pairs_to_drop(log_ratios: Mapping[PairId, float], max_bias: float) -> set[PairId]:
    """Return pairs without which the mean of d is within ±`max_bias`. They are few: each in turn is
    the one whose removal leaves the sum nearest to 0, which is the most one-sided pair while the
    sum is large."""
    by_ratio = sorted(log_ratios, key=lambda pair: log_ratios[pair])
    ratios = [log_ratios[pair] for pair in by_ratio]
    total = math.fsum(ratios)
    dropped: set[PairId] = set()
    while ratios and abs(total) > max_bias * len(ratios):
        insertion = bisect.bisect_left(ratios, total)
        candidates = [i for i in (insertion - 1, insertion) if 0 <= i < len(ratios)]
        nearest = min(candidates, key=lambda i: abs(total - ratios[i]))
        dropped.add(by_ratio.pop(nearest))
        total -= ratios.pop(nearest)
    return dropped
