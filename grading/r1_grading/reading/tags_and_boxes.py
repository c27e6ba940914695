"""Finds an answer by its form: in tags, a box, or the last line, as the reading `strict` does.

`final_answer` has the other readings, which are built of these parts."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import regex as re  # not Python's: see rewards.py

from r1_grading.base.errors import shorten

THINK, END_THINK = "<think>", "</think>"
ANSWER, END_ANSWER = "<answer>", "</answer>"
BOXES = (r"\boxed", r"\fbox")
OPENED_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?:\{|(?P<bare>[+-]?\d(?:[\d.,/]*\d)?))")
r"""The opening of a box. Also `\boxed 13`: TeX would box only the 1, but every reader understands
13."""
MARKER = "####"
"""Precedes the final answer in GSM8K's solutions, and in responses of models trained on them."""
MARKED_NUMBER = re.compile(r"####\s*([-+$\\.\d][^\n#]*)")
"""A number after the marker: `#### 13`."""
OR_BOX = re.compile(r"(?<=[\s$*,])or[\s$*]{1,9}\\f?box")
r"""A second answer outside the box: `12 or \boxed{13}`, `\boxed{13} or 12`."""
BOX_OR = re.compile(
    r"\}(?:[\s$*,(]|\\text\s*\{){1,9}or(?:[\s$*}]|perhaps|maybe|possibly){1,9}([-+.\d\\][^\s$*)]{0,80})"
)
MAX_BEFORE_OR_CHARS = 80
BETWEEN_BOXES = re.compile(
    r"(?:\s|[$,;]|\\[()\[\],:; ]|\\q?quad|\\text\s*\{\s*(?:,?\s*(?:and|or))?\s*\}"
    r"|\band\b|\bor\b){0,40}"
)
"""Boxes with only this between them are one answer of several parts, not corrections."""
MAX_BOXES = 100
CLOSING = re.compile(
    r"(?:\\(?:blacksquare|square|qed|Box)(?![A-Za-z])|[■□]"
    r"|\\\\|(?<!\\)\\(?:[,;:!. ]|$)|[~\s.,。，])+$"
)
r"""Spaces, stops and the end of a proof after an answer: `204\,.`, `204\ ` whose space was
stripped, `204 \\`, `204 \blacksquare`."""
MAX_CLOSING_CHARS = 80  # a long run of spaces within an answer would be tried at each of them
SPECIAL_TOKEN = re.compile(
    r"(?:<\|[\w-]{1,40}\|>|<｜[^｜<>]{1,40}｜>|</?s>|<(?:eos|bos|eod|pad|unk|(?:start|end)_of_turn)>"
    r"|\[/?INST\]|\[(?:EOS|PAD|END)\])$"
)
"""A special token of chat templates at the end: a model may write one as text, or a rollout end
with one."""
MAX_TOKEN_CHARS = 44
TRIMMED_CHARS = (
    "".join(filter(str.isspace, map(chr, range(0x3001)))) + "\ufeff\u200b\u200c\u200d\u2060"
)
"""Spaces and invisible characters (a byte-order mark, a zero-width space) around an answer."""
BRACES = re.compile(r"\\.|[{}]", re.DOTALL)
DELIMITERS = (
    ("$$", "$$"),
    ("$", "$"),
    (r"\(", r"\)"),
    (r"\[", r"\]"),
    ("**", "**"),
    ("`", "`"),
    ("__", "__"),
    ("_", "_"),
    ('"', '"'),
    ("'", "'"),
    ("“", "”"),
    *((rf"\{font}{{", "}") for font in ("text", "textbf", "textit", "mathbf", "mathrm")),
    (r"\underline{", "}"),
    *((box + "{", "}") for box in BOXES),
)
DISPLAYS = ((r"\[", r"\]"), ("$$", "$$"))
"""The two forms of a displayed formula."""
NUMBER_PATTERN = r"[-+]?\d++(?:[.,/]\d++)*+\\?%?"
"""A number next to a box: a decimal, a fraction, thousands, percent."""
GLUE = r"(?:[\s$*]|\\[ ,;:!])"
BARE_BEFORE = re.compile(
    rf"{GLUE}{{0,9}}(?P<number>{NUMBER_PATTERN}){GLUE}{{0,9}}[,;.]?{GLUE}{{0,9}}"
    rf"(?:(?:and|so|then|thus|hence|therefore|no|but){GLUE}{{0,9}}[,:]?)?{GLUE}{{0,9}}",
    re.IGNORECASE,
)
r"""Only the number, and at most a word that draws a conclusion from it: `12, so \boxed{13}`."""
LIST_ITEM = re.compile(r"\s*\d{1,2}\.\s*")
r"""`1. \boxed{13}`: an item of a list."""
BARE_AFTER = re.compile(
    rf"{GLUE}{{0,9}}[,;.]?{GLUE}{{0,9}}(?P<number>{NUMBER_PATTERN}){GLUE}{{0,9}}[.,;]?{GLUE}{{0,9}}"
)
"""Only a number after a box: `\\boxed{13}, 12.`"""
MAX_BARE_CHARS = 120
ANSWER_STATEMENT = re.compile(
    r"(?:(?<!\w)answer\b[\s:*]{0,9}(?:is\b|=)?|答案(?:是|为|等于|[:：]))[\s:*=$]{0,9}"
    # The number ends here, and is not part of a term, a list or a time.
    rf"(?P<number>{NUMBER_PATTERN})(?![\d.,/]*\d|[A-Za-z^_({{\\:])"
    r"(?![\s$]*[-+*/^=\\:]|\s+\d|[\s$]*(?:or|and|times|plus|minus|more|less|divided|of|to)\b|,\s*\d)",
    re.IGNORECASE,
)
"""A number that is called the answer: `The answer is 13`, `答案是13`."""


@dataclass(frozen=True)
class Extraction:
    """The final answer found in a response.

    Attributes:
        text: the stripped answer, or None.
        reason: why there is none.
        source: where it was found, for the reason of a grade; "" in the strict reading, whose
            answers show it.
        around: the whole text with the box that the answer is from; "" for any other answer."""

    text: str | None
    reason: str = ""
    source: str = ""
    around: str = field(default="", compare=False, repr=False)


OPEN_THOUGHT = Extraction(None, "no answer found: the thought is never closed")


def extract_answer(
    response: str, *, thought_opened: bool = False, reads_last_line: bool = False
) -> Extraction:
    r"""Return the final answer of a response, from the text after its chain of thought.

    Only text after the last `</think>` is searched; a thought that is never closed has none. The
    answer is, in this order: the one `<answer>` block (two, or an unclosed one, are no answer); the
    last `\boxed{}`; with `reads_last_line`, the last line that is not blank, or the display formula
    that ends there. Linear in the length of the response.

    Args:
        response: the text that the policy sampled.
        thought_opened: the prompt ended with `<think>`.
        reads_last_line: whether a last line without tags and boxes is read."""
    visible_text = after_thought(without_special_tokens(response), thought_opened)
    if visible_text is None:
        return OPEN_THOUGHT
    if (tagged_extraction := tagged_answer(visible_text)) is not None:
        return tagged_extraction
    if (boxed_text := last_boxed(visible_text)) is not None:
        return make_extraction(boxed_text, around=visible_text)
    if reads_last_line:
        return make_extraction(last_line_or_formula(visible_text.rstrip()))
    return Extraction(None, "no answer found")


def tagged_answer(visible: str) -> Extraction | None:
    """Return the content of the one `<answer>` block of the text after a thought.

    None where there is no such tag. Two blocks, or an incomplete one, are an extraction without an
    answer."""
    num_open, num_closed = visible.count(ANSWER), visible.count(END_ANSWER)
    if not (num_open or num_closed):
        return None
    if num_open > 1 or num_closed > 1:
        return Extraction(None, f"no answer found: {max(num_open, num_closed)} <answer> blocks")
    start, end = visible.find(ANSWER), visible.find(END_ANSWER)
    if start < 0 or end < start:
        return Extraction(None, "no answer found: the <answer> block is not complete")
    return make_extraction(visible[start + len(ANSWER) : end])


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last complete `\boxed{…}` or `\fbox{…}`, or None.

    Boxes joined only by "and", "or" or a comma are one answer: `\boxed{12} or \boxed{13}` is "12,
    13"."""
    return next(_boxed_from_the_end(text), None)


def box_span(text: str) -> tuple[int, int] | None:
    r"""Return where the last complete `\boxed{…}` or `\fbox{…}` begins and ends, or None."""
    last_box = next(_boxes_from_the_end(text), None)
    return None if last_box is None else (last_box[0], last_box[3])


def final_answers(block: str) -> list[str]:
    r"""Return all answers that a short text gives, the final one last.

    With boxes: their contents where words separate them, an alternative that "or" joins to one, and
    a bare number next to one. Without a box: the text after the last `####`, and the numbers after
    others. Otherwise the text itself."""
    if boxed_texts := list(_boxed_from_the_end(block)):
        alternatives = [*_alternatives_to_boxes(block), *stated_numbers(block)]
        if last_boxed(boxed_texts[0]) is not None:  # the 12 of `\boxed{12\boxed{13}}`
            alternatives += _alternatives_to_boxes(boxed_texts[0])
        return list(dict.fromkeys((*alternatives, *boxed_texts[1:], boxed_texts[0])))
    _, marker, text_behind = block.rpartition(MARKER)
    if marker and text_behind.strip() and "\n" not in text_behind.strip():
        marked_numbers = [match[1].strip() for match in MARKED_NUMBER.finditer(block)]
        alternatives = adjacent_numbers(block[: block.find(MARKER)])
        return list(dict.fromkeys((*alternatives, *marked_numbers, text_behind.strip())))
    return [block]


def unwrap_answer(answer: str) -> str:
    r"""Return `answer` without `\boxed{}`, dollar signs, `\text{}` and full stops around it.

    The solution before `####` is left out as well."""
    answer = final_answers(answer)[-1]
    answer, previous_answer = trim_invisible(answer), None
    while answer != previous_answer:
        previous_answer = answer
        answer = answer[:-MAX_CLOSING_CHARS] + CLOSING.sub("", answer[-MAX_CLOSING_CHARS:])
        for left, right in DELIMITERS:
            if delimiters_enclose(left, right, answer):
                answer = answer[len(left) : len(answer) - len(right)].strip()
    return answer


def trim_invisible(text: str) -> str:
    """Return `text` without spaces and invisible characters at both ends."""
    return text.strip(TRIMMED_CHARS)


def after_thought(response: str, thought_opened: bool) -> str | None:
    """Return the text after the last `</think>`, or all without one; None for an open thought."""
    _, end_tag, tail = response.rpartition(END_THINK)
    if not end_tag and thought_opened:
        return None
    if THINK in tail:
        return None
    return tail


def _boxed_from_the_end(text: str) -> Iterator[str]:
    """Yield the contents of boxes, joined boxes as one, from the last back to an incomplete one."""
    contents: list[str] = []
    next_start = None
    for start, content_start, end, stop in itertools.islice(_boxes_from_the_end(text), MAX_BOXES):
        content = text[content_start:end]
        if next_start is not None and stop > next_start:
            contents = []  # it encloses the boxes after it
        elif next_start is not None and not (
            0 <= next_start - stop <= 80 and BETWEEN_BOXES.fullmatch(text, stop, next_start)
        ):
            yield ", ".join(contents)
            contents = []
        if content not in contents:
            contents.insert(0, content)
        next_start = start
    if contents:
        yield ", ".join(contents)


def _alternatives_to_boxes(text: str) -> list[str]:
    """Return answers outside all boxes: joined to one by "or", or a bare number next to one."""
    words = [match[1] for match in BOX_OR.finditer(text)]
    for match in OR_BOX.finditer(text):
        text_before = text[max(match.start() - MAX_BEFORE_OR_CHARS, 0) : match.start()]
        words += text_before.replace("$", " ").replace("*", " ").rstrip(" ,\n").split()[-1:]
    words = [word for word in words if not any(box in word for box in BOXES)]
    spans = list(itertools.islice(_boxes_from_the_end(text), MAX_BOXES))
    start, stop = min(span[0] for span in spans), max(span[3] for span in spans)
    return words + adjacent_numbers(text[:start], text[stop:])


def _boxes_from_the_end(text: str) -> Iterator[tuple[int, int, int, int]]:
    """Yield (box start, content start, content end, box end), the last box first."""
    start_by_box = {box: text.rfind(box) for box in BOXES}
    while (start := max(start_by_box.values())) >= 0:
        match = OPENED_BOX.match(text, start)
        if match is not None and match["bare"]:
            yield start, *match.span("bare"), match.end()
        elif match is not None:
            if (end := closing_brace(text, match.end())) is None:
                return
            yield start, match.end(), end, end + 1
        for box, position in start_by_box.items():
            if position == start:
                start_by_box[box] = text.rfind(box, 0, start)


def last_line_or_formula(visible: str) -> str:
    """Return the last line of a text, or the display formula that ends with it."""
    start = visible.rfind("\n") + 1
    for left, right in DISPLAYS:
        if visible[start:].strip() == right:
            return visible[max(visible.rfind(left, 0, len(visible) - len(right)), 0) :]
    return visible[start:]


def without_special_tokens(text: str) -> str:
    """Return `text` without special tokens at its end and the spaces next to them.

    Linear: a pattern that begins with spaces would be tried at each space of a long run."""
    end = stop = _end_of_text(text, len(text))
    while match := SPECIAL_TOKEN.search(text, max(end - MAX_TOKEN_CHARS, 0), end):
        end = _end_of_text(text, match.start())
    return text if end == stop else text[:end]


def _end_of_text(text: str, end: int) -> int:
    while end and text[end - 1].isspace():
        end -= 1
    return end


def make_extraction(answer: str, source: str = "", around: str = "") -> Extraction:
    """Return the extraction of `answer`, or of none if it is blank.

    Args:
        answer: the text as it was found.
        source: where it was found, for the reason.
        around: the text that its box stands in."""
    answer = trim_invisible(without_special_tokens(answer))
    if not answer:
        return Extraction(None, "no answer found: it is empty")
    return Extraction(answer, source=source, around=around)


def delimiters_enclose(left: str, right: str, answer: str) -> bool:
    """Whether the delimiter at the start of an answer belongs to that at its end.

    Args:
        left: the opening delimiter.
        right: the closing one.
        answer: the text, which need not have them."""
    if not (answer.startswith(left) and answer.endswith(right)):
        return False
    if right == "}":
        return closing_brace(answer, len(left)) == len(answer) - 1
    content = answer[len(left) : len(answer) - len(right)]
    return len(answer) > len(left) + len(right) and left not in content and right not in content


def closing_brace(text: str, start: int) -> int | None:
    """Return the position that closes the brace opened just before `start`, or None."""
    depth = 1
    for brace in BRACES.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return brace.start()
    return None


def describe_comparison(answer: str, expected: str, correct: bool, source: str = "") -> str:
    """Return the reason of a comparison: "correct: 13" or "wrong: 12, expected 13".

    Args:
        answer: the response's answer.
        expected: the truth.
        correct: whether they are equal.
        source: where the answer was found, as in "correct: 13 (in the last line)"."""
    location = f" ({source})" if source else ""
    if correct:
        return f"correct: {shorten(answer)}{location}"
    return f"wrong: {shorten(answer)}, expected {shorten(expected)}{location}"


def adjacent_numbers(before: str, after: str = "") -> list[str]:
    r"""Return the numbers that alone make up the text before or after a box: `12 \boxed{13}`.

    Those within a sentence or a calculation explain the answer, and are not returned."""
    numbers = []
    for pattern, text in ((BARE_BEFORE, before), (BARE_AFTER, after)):
        if len(text) > MAX_BARE_CHARS or (pattern is BARE_BEFORE and LIST_ITEM.fullmatch(text)):
            continue
        if (match := pattern.fullmatch(text)) is not None:
            numbers.append(match["number"])
    return numbers


def stated_numbers(text: str) -> list[str]:
    """Return the numbers called the answer: two in "The answer is 12. … answer: 13"."""
    return [match["number"] for match in ANSWER_STATEMENT.finditer(text)]
