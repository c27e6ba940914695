"""Format reward: the response is `<think>…</think><answer>…</answer>` and nothing else."""

from megatron_r1.rewards.answer import ANSWER, END_ANSWER, END_THINK, THINK
from megatron_r1.rewards.base import Grade

TAGS = (THINK, END_THINK, ANSWER, END_ANSWER)
# The text between the tags in DeepSeek-R1-Zero's template, and in papers that quote it.
PLACEHOLDERS = frozenset({"reasoning process here", "answer here", "…", "..."})


def grade(response: str, truth: object = None, *, opened: bool = False, **entry: object) -> Grade:
    """Return 1 if the four tags each occur once, in order, with only white space outside; else 0.

    opened: the prompt ended with `<think>`, so the response starts inside the thought and must not
    open it again. Thought and answer may hold any text, or none, but not the prompt's own example.
    """
    text = (THINK + response if opened else response).strip()
    for tag in TAGS:
        if (num_found := text.count(tag)) != 1:
            return Grade(0.0, f"bad format: {tag} occurs {num_found} times")
    positions = [text.find(tag) for tag in TAGS]
    if positions != sorted(positions):
        return Grade(0.0, "bad format: the tags are out of order")
    between = text[positions[1] + len(END_THINK) : positions[2]]
    if positions[0] != 0 or between.strip() or not text.endswith(END_ANSWER):
        return Grade(0.0, "bad format: text outside the tags")
    thought = text[len(THINK) : positions[1]]
    answer = text[positions[2] + len(ANSWER) : positions[3]]
    if any(_is_placeholder(part) for part in (thought, answer)):
        return Grade(0.0, "bad format: the prompt's example, copied")
    return Grade(1.0, "format as asked")


def _is_placeholder(part: str) -> bool:
    if len(part) > 200:
        return False
    words = " ".join(part.casefold().split())
    return words in PLACEHOLDERS or words.rstrip(".!… ") in PLACEHOLDERS
