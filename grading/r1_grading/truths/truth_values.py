r"""Truths as public data sets write them: any of several, none at all, or a solution with a mark.

A truth that nothing can be compared with is found here, before anything is sampled. Imports no
library for mathematics, so that all rows of a large file are checked in seconds."""

import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from r1_grading.base.errors import shorten
from r1_grading.base.values import decode_literal, find_non_finite
from r1_grading.code.problem import parse_problem
from r1_grading.code.public_formats import is_tests
from r1_grading.reading.tags_and_boxes import MARKER, last_boxed, unwrap_answer
from r1_grading.rewards import REWARD_KINDS

NO_TRUTH = (
    "proof",
    "notfound",
    "not found",
    "n/a",
    "n.a.",
    "none",
    "null",
    "nil",
    "nan",
    "<na>",
    "unknown",
    "undefined",
    "no answer",
    "noanswer",
    "invalid",
    "missing",
    "empty",
    "error",
    "todo",
    "tbd",
    "fixme",
    "xxx",
    "-",
    "--",
    "---",
    "–",
    "—",
    "?",
    "??",
    "???",
    "...",
    "…",
)
"""Words that data sets write where there is no answer: NuminaMath-1.5 has "proof" and "notfound".
"""
WRAPPING = "[](){}<>\"'`*_ \t\r\n.:!"
ANSWER_KEYS = (
    "target",
    "golden_answers",
    "answers",
    "answer",
    "ground_truth",
    "value",
    "aliases",
    "text",
    "spans",
)
"""The keys of a mapping that is a truth of any kind but code."""
MAX_NONE_CHARS = 200
"""A longer text is a truth."""
MAX_WORDS = 60
"""A truth of more words, with sentences, is a solution: a choice."""
PROGRAM = re.compile(
    r"\s*(?:```|def \w|class \w+[(:]|import \w|from \w+ import |#include|return |print\("
    r"|[\w, ]+= ?(?:int|list|map|input)\()"
)
THOUGHT_ENDS = ("</think>", "<|end_of_thought|>")
LONG_WORD = re.compile(r"[^\W\d_]{3,}")
MAX_MARKED_CHARS = 40
"""Longer lines behind `####` are headings of Markdown where further lines follow: a choice."""
NO_NUMBER = re.compile(r"[-+]?(?:nan|inf)\s*\\?%?", re.IGNORECASE)
COMPARING_REWARDS = tuple(name for name, kind in REWARD_KINDS.items() if kind.compares_truth)
"""The rewards that compare an answer with one or any of several truths."""


def accepted_answers(truth: Any) -> list[Any]:
    """Return the truths any of which an answer may equal.

    They are the entries of a list, of `{"target": …}`, or of either as JSON text; else the truth
    itself. A list in text counts where its entries are text: `["18"]`, while `[1, 2]` is an
    interval."""
    if isinstance(truth, str):
        answers = _decode_answers(truth)
        return [truth] if answers is None else accepted_answers(answers)
    if isinstance(truth, Mapping) and truth and truth.keys() <= set(ANSWER_KEYS) | IGNORED_KEYS:
        answers = _flatten_answers(
            [truth[key] for key in ANSWER_KEYS if truth.get(key) is not None]
        )
        return [entry for index, entry in enumerate(answers) if entry not in answers[:index]]
    return _flatten_answers(truth) if isinstance(truth, list | tuple) else [truth]


IGNORED_KEYS = {
    "normalized_aliases",
    "normalized_value",
    "matched_wiki_entity_name",
    "type",
    "normalized_matched_wiki_entity_name",
    "answer_start",
    "types",
}
"""Keys of TriviaQA's answers that repeat others, and of places in a text (SQuAD, DROP)."""


def is_missing(truth: Any, words: Collection[str] = NO_TRUTH) -> bool:
    """Return whether a truth is missing.

    It is null, NaN, blank, an empty list, or one of `words`, in any case, in brackets or not. Of
    several all must be."""
    if isinstance(truth, Mapping):
        answers = accepted_answers(truth)
        return answers != [truth] and is_missing(answers, words)
    if isinstance(truth, list | tuple):
        return all(is_missing(entry, words) for entry in truth)
    if isinstance(truth, str) and not truth.isdecimal() and states_no_answer(truth):
        return True
    if truth is None or (isinstance(truth, float) and math.isnan(truth)):
        return True
    if not isinstance(truth, str) or len(truth) > MAX_NONE_CHARS or truth.isdecimal():
        return False
    answers = accepted_answers(truth)
    if answers != [truth]:
        return is_missing(answers, words)
    bare_truth = unwrap_answer(truth).casefold()
    none_words = {word.casefold() for word in words}
    return (
        not bare_truth
        or bare_truth in none_words
        or (bare_truth.strip(WRAPPING) in none_words and bool(words))
    )


def states_no_answer(text: str) -> bool:
    """Return whether a text is a program, a response with its thought, or a proof.

    A proof is a whole solution that marks no answer by a box or `####`. No answer can be compared
    with these."""
    if (PROGRAM.match(text) and not is_tests(text)) or any(mark in text for mark in THOUGHT_ENDS):
        return True
    is_long = len(text.split()) > MAX_WORDS and any(mark in text for mark in (". ", ".\n"))
    return is_long and MARKER not in text and last_boxed(text) is None and not is_tests(text)


def guess_reward_kind(truth: Any) -> str:
    """Return the reward that compares with a truth.

    It is `code` for tests of a program, `exact_match` for any of several names or phrases, else
    `math`."""
    if is_tests(truth):
        return "code"
    answers = accepted_answers(truth)
    is_several = answers != [truth]
    words = [t for t in answers if isinstance(t, str) and LONG_WORD.search(t) and "\\" not in t]
    return "exact_match" if is_several and words else "math"


def answer_after_mark(truth: str) -> str:
    """Return what stands behind the last `####`, as GSM8K marks answers.

    Further lines may follow an answer with a digit. A truth without the mark, with a box, or with
    nothing behind the mark is returned itself."""
    if MARKER not in truth or last_boxed(truth) is not None:
        return truth
    first, *other_lines = truth.rpartition(MARKER)[2].strip().splitlines() or [""]
    is_answer = len(first) <= MAX_MARKED_CHARS and any(map(str.isdigit, first))
    return first.strip() if first and (is_answer or not other_lines) else truth


def truth_answer(truth: Any) -> Any:
    """Return the final answer of a truth that is a solution, for people to read.

    It is in the last box or behind `####`; any other truth is returned itself."""
    if not isinstance(truth, str):
        return truth
    return answer_after_mark(truth) if (box := last_boxed(truth)) is None else box


def math_truth(truth: object) -> str:
    r"""Return the answer that a truth of `math` states, without dollar signs and `\boxed{}`.

    Raises:
        ValueError: a truth that is blank, not finite, or not a number, text, true or false.
    """
    if isinstance(truth, str) and truth.isdecimal():
        return truth
    if not isinstance(truth, str | int | float):
        raise ValueError(f"the truth of a math answer is a string or a number, got {truth!r}")
    expected = unwrap_answer(answer_after_mark(str(truth)))
    if NO_NUMBER.fullmatch(expected):  # of a float, or of a table's empty cell
        raise ValueError(f"the truth of a math answer must be finite, got {truth!r}")
    if not expected.strip("$"):
        raise ValueError(f"the truth of a math answer must not be blank, got {truth!r}")
    if MARKER in expected:
        raise ValueError(
            f"the truth of a math answer must have its answer after {MARKER}, or be that answer, "
            f"got {shorten(expected)!r}"
        )
    return expected


def check_truth(kind: str, truth: Any, fields: Mapping[str, Any]) -> None:
    """Raise for a truth that the reward `kind` cannot compare with.

    Rewards of a user's own, served ones and those without a truth are not checked.

    Args:
        kind: the reward's name.
        truth: what the row compares with, of any type of JSON.
        fields: the row's other columns.

    Raises:
        ValueError: the truth does not fit."""
    if check := CHECKS.get(kind):
        if fault := find_non_finite(truth, "truth"):
            raise ValueError(fault)
        check(truth, fields)


def _check_alternatives(truth: Any, fields: Mapping[str, Any]) -> None:
    answers = accepted_answers(truth)
    if not answers:
        raise ValueError("the truth is a list without an answer")
    for entry in answers:
        math_truth(entry)
        if isinstance(decode_literal(entry), Mapping):
            raise ValueError(
                f"the truth is a mapping, {shorten(entry)}, and no answer; name a reward of your "
                "own that reads it (data.kind: module:function)"
            )


def _check_code(truth: Any, fields: Mapping[str, Any]) -> None:
    parse_problem(truth, fields.get("language"))


CHECKS: dict[str, Callable[[Any, Mapping[str, Any]], None]] = {
    **dict.fromkeys(COMPARING_REWARDS, _check_alternatives),
    "code": _check_code,
}
"""Kind → its check."""


def _flatten_answers(entries: Any) -> list[Any]:
    """Return the entries of a list, those of lists and of mappings of answers in it too."""
    flat_answers: list[Any] = []
    for entry in entries:
        is_nested = isinstance(entry, list | tuple | Mapping)
        answers = accepted_answers(entry) if is_nested else [entry]
        flat_answers += _flatten_answers(answers) if is_nested and answers != [entry] else answers
    return [entry for entry in flat_answers if entry is not None]


def _decode_answers(text: str) -> Any:
    """Return a list of text or a mapping that a text is as JSON or a Python value, else None."""
    literal = text.strip()
    if not (literal.startswith(('["', '{"', "['", "{'")) and literal.endswith(("]", "}"))):
        return None
    value = decode_literal(literal)
    if isinstance(value, list):
        return value if all(isinstance(entry, str) for entry in value) else None
    return (
        value
        if isinstance(value, dict) and value.keys() <= set(ANSWER_KEYS) | IGNORED_KEYS
        else None
    )
