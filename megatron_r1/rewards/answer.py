"""The final answer of a response, found the same way for every reward that needs one."""

import re
from dataclasses import dataclass

from megatron_r1.rewards.base import shorten

THINK, END_THINK = "<think>", "</think>"
ANSWER, END_ANSWER = "<answer>", "</answer>"
BOXED = r"\boxed"
BRACES = re.compile(r"\\.|[{}]", re.DOTALL)
DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), (r"\text{", "}"))


@dataclass(frozen=True)
class Extraction:
    """text: the answer, stripped, or None with the reason why there is none."""

    text: str | None
    reason: str = ""


def extract(response: str, *, opened: bool = False, plain_line: bool = False) -> Extraction:
    r"""The answer a response commits to after its chain of thought.

    What is thought never counts: only text after the last `</think>` is searched, and nothing of a
    thought that was left open (`opened`: the prompt ended with `<think>`). There, in this order:
    the one `<answer>` block (two, or an unclosed one, are no answer); the last `\boxed{}`; with
    `plain_line`, the last line that is not blank. Linear in the length of the response.
    """
    visible = _after_thought(response, opened)
    if visible is None:
        return Extraction(None, "no answer found: the thought is never closed")
    num_open, num_closed = visible.count(ANSWER), visible.count(END_ANSWER)
    if num_open > 1 or num_closed > 1:
        return Extraction(None, f"no answer found: {max(num_open, num_closed)} <answer> blocks")
    if num_open or num_closed:
        start, end = visible.find(ANSWER), visible.find(END_ANSWER)
        if start < 0 or end < start:
            return Extraction(None, "no answer found: the <answer> block is not complete")
        return _present(visible[start + len(ANSWER) : end])
    if (boxed := last_boxed(visible)) is not None:
        return _present(boxed)
    if plain_line:
        return _present(visible.rstrip().rpartition("\n")[2])
    return Extraction(None, "no answer found")


def last_boxed(text: str) -> str | None:
    r"""What the last `\boxed{…}` holds, nested braces included; None without a complete one."""
    start = text.rfind(BOXED + "{")
    if start < 0:
        return None
    start += len(BOXED) + 1
    end = _closing_brace(text, start)
    return None if end is None else text[start:end]


def unwrap(answer: str) -> str:
    r"""`answer` without its decoration: `\boxed{}`, dollar signs, `\text{}`, a full stop."""
    if (boxed := last_boxed(answer)) is not None:
        answer = boxed
    answer, before = answer.strip(), None
    while answer != before:
        before = answer
        answer = answer.removesuffix(".").rstrip()
        for left, right in DELIMITERS:
            if _encloses(left, right, answer):
                answer = answer[len(left) : len(answer) - len(right)].strip()
    return answer


def is_balanced(text: str) -> bool:
    r"""Whether every brace that is not escaped (`\{`) has its partner."""
    end = _closing_brace(text + "}", 0)
    return end == len(text)


def _after_thought(response: str, opened: bool) -> str | None:
    head, closed, tail = response.rpartition(END_THINK)
    if not closed and opened:
        return None
    if THINK in tail:
        return None
    return tail


def _present(answer: str) -> Extraction:
    answer = answer.strip()
    return Extraction(answer) if answer else Extraction(None, "no answer found: it is empty")


def _encloses(left: str, right: str, answer: str) -> bool:
    if not (answer.startswith(left) and answer.endswith(right)):
        return False
    if right == "}":
        return _closing_brace(answer, len(left)) == len(answer) - 1
    inner = answer[len(left) : len(answer) - len(right)]
    return len(answer) > len(left) + len(right) and left not in inner and right not in inner


def _closing_brace(text: str, start: int) -> int | None:
    """Where the brace that was opened just before `start` is closed."""
    depth = 1
    for brace in BRACES.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return brace.start()
    return None


def describe(answer: str, expected: str, correct: bool) -> str:
    """The reason of a comparison: "correct: 13" or "wrong: 12, expected 13"."""
    if correct:
        return f"correct: {shorten(answer)}"
    return f"wrong: {shorten(answer)}, expected {shorten(expected)}"
