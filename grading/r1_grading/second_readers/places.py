r"""Where a response states its answer, for the second reader: tags, one box, or the last line.

It knows few forms and refuses all others (`Unsure`): the reward's own rules are in `reading`, and
what both would read alike must not come from the same patterns."""

import re

THOUGHT_END = "</think>"
TAGS = re.compile(r"</?answer>")
SPECIAL = re.compile(r"\s*(?:<\|[^|<>]{1,40}\|>|<｜[^｜<>]{1,40}｜>|</s>|<eos>|<end_of_turn>)\s*\Z")
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
DELIMITERS = re.compile(r"\\[()\[\]]|[$*`_#]")
HARMLESS_AFTER = re.compile(r"[\s.,;!]*\Z")
CONCLUDES = re.compile(
    r"(?:\b(?:is|are|get|have|equals|answer|so|thus|hence|therefore),?|[:=])\s*\Z", re.IGNORECASE
)
CHANGES = re.compile(
    r"\b(?:not|no|never|neither|nor|cannot|doubt|maybe|perhaps|could|might|would|wrong|incorrect"
    r"|false|if|or|than|least|most|about|near|nearly|almost|half|twice|double|minus|negative|either"
    r"|unless|except|some|guess|wait|actually|correction|instead|mistake|sorry|recheck|hmm|oops)\b|n't|\?",
    re.IGNORECASE,
)
"""Words that may deny or change a value in their line."""
STATES = re.compile(
    r"(?:(?:so|thus|hence|therefore|then|and)\b,?\s*)?"
    r"(?:(?:the|my|our)\s+)?(?:final\s+|correct\s+)?answer\s*(?:is|:|=|is:)\s*",
    re.IGNORECASE,
)
"""How a line begins that only states an answer."""


class Unsure(Exception):
    """The reader has no rule for a text; its message says what it met."""


def visible_text(response: str, opened: bool) -> str | None:
    """Return what follows the chain of thought, stripped; None where it never ends."""
    text = response
    while (shorter := SPECIAL.sub("", text)) != text:
        text = shorter
    _, mark, after = text.rpartition(THOUGHT_END)
    if mark:
        return after.strip()
    return None if opened or "<think>" in text else after.strip()


def find_answer(visible: str, reading: str) -> str | None:
    r"""Return the text of the answer, or None where there surely is none.

    Args:
        visible: the response after its thought.
        reading: `rewards.answer`: with "tags" and "boxed" no other place counts.

    Raises:
        Unsure: the answer may be stated in a form that has no rule here."""
    if not visible:
        return None
    tags = list(TAGS.finditer(visible))
    if reading in ("strict", "tags", "auto") and tags:
        if [tag[0] for tag in tags] != ["<answer>", "</answer>"]:
            raise Unsure("several or unclosed answer tags")
        inner = visible[tags[0].end() : tags[1].start()].strip()
        if BOX.search(inner):
            return _only_box(inner)
        return inner or None
    if reading == "tags":
        return None
    if BOX.search(visible) and reading != "last":
        return _only_box(visible)
    if reading == "boxed":
        return None
    return _last_line(visible)


def true_answer(truth: str) -> str:
    r"""Return what a truth states: the content of its last box, the text after `####`, or all."""
    boxes = list(BOX.finditer(truth))
    if boxes and (end := _closing(truth, boxes[-1].end())) is not None:
        return truth[boxes[-1].end() : end].strip()
    return truth.rpartition("####")[2].strip()


def _only_box(text: str) -> str:
    """Return the content of the one box, if its line only introduces it."""
    boxes = list(BOX.finditer(text))
    if len(boxes) != 1:
        raise Unsure("several boxes")
    start = boxes[0].end()
    end = _closing(text, start)
    if end is None:
        raise Unsure("a box that is not closed")
    around = text[: boxes[0].start()].rpartition("\n")[2], text[end + 1 :].partition("\n")[0]
    before, after = (DELIMITERS.sub(" ", part) for part in around)
    is_introduced = not before.strip() or CONCLUDES.search(before)
    if (
        not is_introduced
        or re.search(r"\d", before)
        or CHANGES.search(before)
        or not HARMLESS_AFTER.match(after)
    ):
        raise Unsure("words or signs next to the box")
    lines = [line for line in text[end:].splitlines()[1:] if DELIMITERS.sub("", line).strip()]
    if any(CHANGES.search(line) for line in lines):
        raise Unsure("words after the box")
    if not text[start:end].strip():
        raise Unsure("an empty box")
    return text[start:end].strip()


def _closing(text: str, start: int) -> int | None:
    depth = 1
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if not depth:
            return match.start()
    return None


def _last_line(visible: str) -> str:
    """Return what a line with the mark `####` states, or that only states an answer, if there is
    one; else the last line."""
    lines = [re.sub(r"\*\*", "", line).strip() for line in visible.splitlines() if line.strip()]
    stating = [
        number
        for number, line in enumerate(lines)
        if "####" in line or STATES.match(line) is not None
    ]
    if len(stating) > 1:
        raise Unsure("several marks")
    number = stating[0] if stating else len(lines) - 1
    if any(re.search(r"\d", line) or CHANGES.search(line) for line in lines[number + 1 :]):
        raise Unsure("words after the answer")
    if any(line.startswith((">", "```")) for line in lines):
        raise Unsure("a quotation")
    line = lines[number].rpartition("####")[2]
    if CHANGES.search(line) or re.search(r"(?:\A|\s)[-–]\s", line):
        raise Unsure("a sentence, or an item of a list")
    return STATES.sub("", line.strip(), count=1).strip()
