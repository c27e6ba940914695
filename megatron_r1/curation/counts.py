"""Counts of the decisions, for curation.json and for the terminal."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

from megatron_r1.curation.decision import Decision
from megatron_r1.rewards.combine import ACCURACY


class DecisionCounts:
    """`add` takes every response's line with its decision, one question after the other."""

    def __init__(self) -> None:
        self.decisions: Counter[str] = Counter()
        self.num_responses = self.num_kept = self.num_kept_tokens = 0
        self.num_questions = self.num_questions_with_kept = 0
        self._by_kind: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._accuracy = [0.0, 0]
        self._question: str | None = None
        self._has_kept = False

    def add(self, line: Mapping[str, Any], decision: Decision) -> None:
        if line["id"] != self._question:
            self._question, self._has_kept = line["id"], False
            self.num_questions += 1
        self.num_responses += 1
        self.decisions[decision.code] += 1
        of_kind = self._by_kind[line["kind"]]
        of_kind["answers"] += 1
        if ACCURACY in line["rewards"]:
            self._accuracy[0] += line["rewards"][ACCURACY]
            self._accuracy[1] += 1
        if decision.is_kept:
            self.num_kept += 1
            self.num_questions_with_kept += not self._has_kept
            self._has_kept = True
            of_kind["kept"] += 1
            self.num_kept_tokens += line["length"] or 0

    def as_json(self) -> dict[str, Any]:
        """Return the content of curation.json.

        accuracy: mean over graded responses, None without any. kept_tokens: as sampled, before
        rewriting.
        """
        total, count = self._accuracy
        return {
            "questions": self.num_questions,
            "questions_with_kept": self.num_questions_with_kept,
            "answers": self.num_responses,
            "kept": self.num_kept,
            "kept_tokens": self.num_kept_tokens,
            "accuracy": total / count if count else None,
            "decisions": dict(self.decisions.most_common()),
            "kinds": {
                kind: {"answers": counts["answers"], "kept": counts["kept"]}
                for kind, counts in sorted(self._by_kind.items())
            },
        }

    def table(self) -> str:
        """Return a line per decision, the most frequent first."""
        width = max((len(code) for code in self.decisions), default=0)
        lines = [
            f"  {code:<{width}}  {count:>9,}  {count / self.num_responses:>6.1%}"
            for code, count in self.decisions.most_common()
        ]
        head = (
            f"{self.num_responses:,} answers to {self.num_questions:,} questions, "
            f"{self.num_kept:,} kept, of {self.num_questions_with_kept:,} questions"
        )
        return "\n".join([head, *lines])
