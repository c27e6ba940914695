"""The decision on a response, a code with its reason, and the counts of decisions."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from r1_grading.terms import ACCURACY

KEPT, NOT_CHOSEN = "kept", "not_chosen"
CHOSEN, REJECTED = "chosen", "rejected"
SAFE, UNSAFE = "safe", "unsafe"
UNGRADED = "ungraded"
DUPLICATE = "duplicate"


@dataclass(frozen=True)
class Decision:
    """Whether a response is kept, and why. code: the field `decision` in samples.jsonl. why: the
    reason, for a person who reads the line."""

    code: str
    why: str = ""

    @property
    def is_kept(self) -> bool:
        """Whether the response is in the file that is trained on."""
        return self.code in (KEPT, CHOSEN, REJECTED, SAFE, UNSAFE)


class DecisionCounts:
    """Counts for curation.json and for the terminal."""

    def __init__(self) -> None:
        self.decisions: Counter[str] = Counter()
        self.num_kept = self._num_kept_tokens = self._num_graded = 0
        self._accuracy = 0.0
        self._kinds: dict[str, Counter[str]] = {}  # kind → number of "answers" and of "kept"
        self._questions: dict[str, bool] = {}  # id → whether a response is kept

    def add(self, line: Mapping[str, Any], decision: Decision) -> None:
        """Count the decision about the response of a line."""
        self.decisions[decision.code] += 1
        of_kind = self._kinds.setdefault(line["kind"], Counter(answers=0, kept=0))
        of_kind.update(answers=1, kept=decision.is_kept)
        self._questions[line["id"]] = decision.is_kept or self._questions.get(line["id"], False)
        if ACCURACY in line["rewards"]:
            self._accuracy += line["rewards"][ACCURACY]
            self._num_graded += 1
        if decision.is_kept:
            self.num_kept += 1
            self._num_kept_tokens += line["length"] or 0

    def as_json(self) -> dict[str, Any]:
        """Return the content of curation.json. accuracy: the mean over graded responses; None
        without graded responses. kept_tokens: the sampled tokens, before rewriting."""
        return {
            "questions": len(self._questions),
            "questions_with_kept": sum(self._questions.values()),
            "answers": self.decisions.total(),
            "kept": self.num_kept,
            "kept_tokens": self._num_kept_tokens,
            "accuracy": self._accuracy / self._num_graded if self._num_graded else None,
            "decisions": dict(self.decisions.most_common()),
            "kinds": {kind: dict(counts) for kind, counts in sorted(self._kinds.items())},
        }

    def table(self) -> str:
        """Return a line per decision, the most frequent first."""
        total = self.decisions.total()
        width = max((len(code) for code in self.decisions), default=0)
        lines = [
            f"  {code:<{width}}  {count:>9,}  {count / total:>6.1%}"
            for code, count in self.decisions.most_common()
        ]
        head = (
            f"{total:,} responses to {len(self._questions):,} questions, {self.num_kept:,} kept, "
            f"of {sum(self._questions.values()):,} questions"
        )
        return "\n".join([head, *lines])
