r"""Reads an answer that is marked as such before closing prose.

`#### 42`, `The answer is 42.`, `**Answer: 42**` and a heading `Final Answer` above it are marks; `I
checked it in 3 steps.` may follow. The last mark counts if it states one value and nothing else. It
does not count where it is quoted (`A student wrote: The answer is 42.`), and where the text after
it takes it back or draws another conclusion; what ends the text is read then."""

import re

from r1_grading.reading.context import CHANGE_AFTER, DENIAL, after_answer_is
from r1_grading.reading.last_number import DIGIT_GROUPS, last_number, with_plain_signs
from r1_grading.reading.tags_and_boxes import MARKER, Extraction, make_extraction

ANSWER_MARK = re.compile(r"####|answer|答案", re.IGNORECASE)
MAX_MARKS = 20
"""Marks that are tried, from the end: each may search the text after it."""
MAX_LINE_CHARS = 2_000
SENTENCE_END = re.compile(
    r"(?<=[.!。！])(?:\*\*|[*_\"”)])*(?:\s+(?=[*_\"“(]{0,3}[A-Z\u0080-\uffff])|(?<=[。！]))"
)
"""Between two sentences of a line."""
EMPHASIZED = re.compile(r"\*\*[^*\n]{1,400}\*\*")
CHINESE = re.compile(r"答案(?:是|为|等于|[:：])\s*[:：]?")
HEADING = re.compile(r"(?:the )?(?:final )?answer\s*[:.]?", re.IGNORECASE)
"""A line that announces the answer in the next one."""
DECORATION_CHARS = "*_`#>-•:= \t"
UNIT = r"(?:\s(?!(?:so|for|if|or|and|but|plus|minus|times|when|not|is|was|only)\b)[a-z°²³/]{1,20})"
ASSIGNED_NUMBER = re.compile(
    rf"(?:[A-Za-z]\s?=\s?)?(?P<number>[-+]?[\s$€£¥]{{0,2}}[-+]?{DIGIT_GROUPS}\$?(?:\\?%)?){UNIT}{{0,3}}"
)
"""One number, with at most its name (`x = 42`) and its unit (`42 miles per hour`)."""
FORMULA = re.compile(
    r"\$\$?(?P<dollars>[^$\n]{1,400})\$\$?|\\\((?P<round>[^\n]{1,400}?)\\\)"
    r"|\\\[(?P<square>[^\n]{1,400}?)\\\]"
)
TITLE_WORDS = re.compile(r"[^\s.,:;!?]{1,40}(?: [^\s.,:;!?]{1,40}){0,2}")
"""An answer in words: at most three."""
TITLE = re.compile(
    r"(?:step|case|part|question|problem|section|solution|approach|method|check|verif|explan"
    r"|reason|final|answer|conclusion|summary|note|example|given|calculat|comput|find|solve)",
    re.IGNORECASE,
)
"""The beginning of a heading of a solution, in Markdown's `#### Step 2`."""
NUMBERED_TITLE = re.compile(r"[ \t*_]{0,9}\d{1,2}[.)]\s[^\n]*[^\s.!?*_]\s*(?:\n|$)")
"""Another: `#### 2. Add them`. `#### 2. I added them.` is an answer and a sentence."""
QUOTATION_WORDS = re.compile(
    r"\b(?:said|says?|wrote|writes?|claim(?:s|ed)?|thinks?|thought|believes?|answered|replied"
    r"|students?|someone|somebody|people|guess(?:es|ed)?|attempts?|tempting|mistaken|example"
    r"|format|template|like|instead|first|initial(?:ly)?|previous(?:ly)?|earlier|naive(?:ly)?"
    r"|wrong|incorrect|mistakes?|errors?|false|if|suppose|assume|would|could|might)\b",
    re.IGNORECASE,
)
"""Words of a text that introduces somebody else's answer, an example of one, or a rejected one."""
RETRACTION_WORDS = re.compile(
    r"\b(?:wait|actually|oops|whoops|sorry|hold on|hmm+|on second thought|scratch that"
    r"|mistakes?n?|wrong(?:ly)?|incorrect(?:ly)?|false|miscalculated|miscounted|misread|overlooked"
    r"|forgets?|forgot(?:ten)?|missed|misses"
    r"|corrections?|corrected|(?:recheck|recomput|recalculat|redo)\w*(?=[^.]{0,80}:)"
    r"|should (?:be|have)|must be"
    r"|not (?:right|correct|true|valid|the (?:right|correct|final)? ?answer)"
    r"|(?:is|was)n['’]t (?:right|correct|true|valid|the)|instead|rather than|turns out)\b"
    r"|(?:^|[.!?]\s{1,9})no\b(?! (?:other|further|more|need))|不对|错了|更正",
    re.IGNORECASE,
)
"""Text after an answer which takes it back."""
NO_MISTAKE = re.compile(
    r"\b(?:no|not|without|any|avoid(?:s|ing)?|common|nothing)\s(?:\w{1,20}\s){0,2}"
    r"(?:mistakes?|wrong|incorrect|false|corrections?)\b"
    r"|\b(?:do|does|did)(?: not|n['’]t)\b[^.]{0,40}(?:mistakes?|wrong|incorrect)\b",
    re.IGNORECASE,
)
"""`I made no mistake`, `nothing is wrong` take nothing back."""
CONCLUDING = re.compile(
    r"(?:\b(?:so|therefore|thus|hence|in total|altogether|in all|in conclusion|finally|overall"
    r"|(?:which|that|this) (?:gives|makes)|which is|we (?:get|have|obtain))\b"
    r"|[=∴⇒→])[^\n]{0,200}\d",
    re.IGNORECASE,
)
"""A last line that draws a conclusion with a number: another answer, unless it repeats this one."""


def marked_answer(visible: str, truth_is_number: bool) -> Extraction | None:
    """Return the last marked answer of a text, where other text follows it.

    None where there is none, and where the mark is in the text's last sentence, which is read as it
    is.

    Args:
        visible: the text after the thought.
        truth_is_number: whether the truth is a number; other truths may be formulae and words."""
    visible = visible.rstrip()
    marks = [match.start() for match in ANSWER_MARK.finditer(visible)][-MAX_MARKS:]
    spans: set[tuple[int, int]] = set()
    for position in reversed(marks):
        start, end = _sentence_around(visible, position)
        if (start, end) in spans:
            continue
        spans.add((start, end))
        statement = _marked_value(visible, start, end, truth_is_number)
        if statement is None:
            continue
        value, is_prose, end = statement
        text_after = visible[end:].strip(DECORATION_CHARS + "\n\"”')$")
        if not text_after:
            return None
        if _is_quoted(visible, start, end):
            continue
        if _is_taken_back(value, text_after, is_prose):
            return None
        return make_extraction(value, "where it is marked")
    return None


def _sentence_around(text: str, position: int) -> tuple[int, int]:
    """Return where the sentence at a position, within its line, begins and ends.

    Of an emphasized sentence these are the ends of the emphasis."""
    start = text.rfind("\n", 0, position) + 1
    end = text.find("\n", position)
    end = len(text) if end < 0 else end
    if end - start > MAX_LINE_CHARS:
        start = max(start, position - MAX_LINE_CHARS // 2)
        end = min(end, position + MAX_LINE_CHARS // 2)
    for span in EMPHASIZED.finditer(text, start, end):
        emphasis = text[span.start() : span.end()].strip(DECORATION_CHARS)
        if span.start() < position < span.end() and not HEADING.fullmatch(emphasis):
            return span.span()
    for border in SENTENCE_END.finditer(text, start, end):
        if border.start() > position:
            return start, border.start()
        start = border.end()
    return start, end


def _marked_value(
    text: str, start: int, end: int, truth_is_number: bool
) -> tuple[str, bool, int] | None:
    """Return the answer that a marking sentence gives, in itself or in the line below it.

    The result is the value, whether a sentence states it, and the position where it ends."""
    sentence = text[start:end]
    _, marker, marked_text = sentence.rpartition(MARKER)
    if marker and not marked_text.startswith("#"):
        if HEADING.fullmatch(marked_text.strip(DECORATION_CHARS)):
            return _stated_below(text, end, truth_is_number)
        if TITLE.match(marked_text.strip(DECORATION_CHARS)) or NUMBERED_TITLE.match(
            text, end - len(marked_text)
        ):
            return None
        value = _read_value(marked_text, truth_is_number, words=True)
        return (value, False, end) if value else None
    if HEADING.fullmatch(sentence.strip(DECORATION_CHARS)):
        return _stated_below(text, end, truth_is_number)
    if chinese_match := CHINESE.search(sentence):
        stated_text: str | None = sentence[chinese_match.end() :]
    else:
        stated_text = after_answer_is(sentence)
    if stated_text is None:
        return None
    prefix = sentence[: len(sentence) - len(stated_text)]
    value = _read_value(stated_text, truth_is_number, words=":" in prefix[-9:])
    return (value, True, end) if value else None


def _stated_below(text: str, end: int, truth_is_number: bool) -> tuple[str, bool, int] | None:
    """Return what `_marked_value` does, of the first line after a heading that is not blank."""
    tail = text[end:]
    start = end + len(tail) - len(tail.lstrip())
    _, stop = _sentence_around(text, start)
    value = (
        _read_value(text[start:stop], truth_is_number, words=True) if start < len(text) else None
    )
    return (value, False, stop) if value else None


def _read_value(stated: str, truth_is_number: bool, words: bool) -> str | None:
    """Return the one value that a text is."""
    stated = stated.strip().strip("*_`").strip()
    stated = stated.rstrip(".。!！").strip().strip("*_`").strip()
    plain_text = with_plain_signs(stated)
    if number := ASSIGNED_NUMBER.fullmatch(plain_text):
        if CHANGE_AFTER.match(plain_text, number.end("number")):
            return None
        extraction = last_number(plain_text)
        return extraction.text if extraction is not None else None
    if formula := FORMULA.fullmatch(stated):
        return next(filter(None, formula.groups()))
    if truth_is_number or not words or DENIAL.search(stated) or not TITLE_WORDS.fullmatch(stated):
        return None
    return stated


def _is_quoted(text: str, start: int, end: int) -> bool:
    """Return whether a marked answer is somebody else's, or an example."""
    line_start = text.rfind("\n", 0, start) + 1
    prefix, sentence = text[line_start:start], text[start:end]
    if text[line_start:].lstrip().startswith(">") or text[:line_start].count("```") % 2 == 1:
        return True
    text_before = (prefix + sentence)[: len(prefix) + _mark_at(sentence)]
    if text_before.count('"') % 2 == 1 or text_before.count("“") > text_before.count("”"):
        return True
    if QUOTATION_WORDS.search(sentence[: _mark_at(sentence)]):
        return True
    introduction = prefix.rstrip() or text[:line_start].rstrip().rpartition("\n")[2]
    return (
        introduction.rstrip("*_ ").endswith(":")
        and QUOTATION_WORDS.search(introduction) is not None
    )


def _mark_at(sentence: str) -> int:
    match = ANSWER_MARK.search(sentence)
    return match.start() if match else 0


def _is_taken_back(value: str, after: str, is_prose: bool) -> bool:
    """Return whether the text after a marked answer takes it back.

    After a sentence that states an answer it also does by concluding something else."""
    if RETRACTION_WORDS.search(NO_MISTAKE.sub(" ", after)):
        return True
    last_line = after.rpartition("\n")[2]
    if not is_prose or not CONCLUDING.search(last_line):
        return False
    numbers = re.findall(DIGIT_GROUPS, last_line.rpartition("=")[2])
    return re.sub("[$,%+]", "", value).lstrip("-") not in {n.replace(",", "") for n in numbers}
