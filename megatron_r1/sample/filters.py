"""Filters: reasons not to train on a response, even a right one.

A filter is a pure function `(response, prompt, **options) -> str`: why the response is dropped, ""
to keep it. One function and one line in `FILTERS` each. DeepSeek-R1 drops chains of thought with
mixed languages, long paragraphs and code blocks (arXiv 2501.12948, section 2.3.3 of v1), and
repetition where it collects its cold start (v2, supplement B.3). `PooledFilters` runs them in the
reward workers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import regex as re  # not Python's: see grading/r1_grading/rewards.py
from r1_grading import Grade, RewardPool, grade
from r1_grading.reading import (
    ANSWER,
    END_ANSWER,
    END_THINK,
    HAN_PER_WORD,
    HAN_RANGES,
    LANGUAGE_NAMES,
    THINK,
    judged_words,
)

from megatron_r1.data.prompt import Prompt
from megatron_r1.evaluation.response import TextResponse
from megatron_r1.sample.selection import Decision

RESPONSE_FORMS = ("either", "answer_tags", "summary")
FILTERED_TEXTS = ("thought", "response")
HAN_CHARACTER = re.compile(f"[{HAN_RANGES}]")
CODE_FENCE = re.compile(r"^\s*(?:```|~~~)", re.MULTILINE)
FENCED_CODE = re.compile(r"```(?:[^`]|`(?!``))*+```")


def _cut_at_limit(response: TextResponse, prompt: Prompt) -> str:
    """Drop a response that was cut at the token limit: a model trained on it learns not to stop."""
    return f"cut off after {response.length:,} tokens" if response.is_truncated else ""


def _broken_format(response: TextResponse, prompt: Prompt, *, form: str = "either") -> str:
    """Drop a response that is not of the form `form`, or whose thought or summary is empty. An
    empty thought would teach the model not to think.

    Returns:
        Why it is dropped, "" if it is kept.

    Raises:
        ValueError: another form."""
    if form not in RESPONSE_FORMS:
        raise ValueError(f"form must be one of {', '.join(RESPONSE_FORMS)}, got {form!r}")
    text = response.full_text.strip()
    for tag in (THINK, END_THINK):
        if (num_found := text.count(tag)) != 1:
            return f"{tag} occurs {num_found} times"
    thought, _, answer = text.partition(END_THINK)
    if not thought.startswith(THINK):
        return f"text before {THINK}"
    if not thought.removeprefix(THINK).strip():
        return "the thought is empty"
    has_tags = ANSWER in answer or END_ANSWER in answer
    if has_tags and form == "summary":
        return f"{ANSWER} in the summary"
    if has_tags or form == "answer_tags":
        verdict = grade("format", response.text, thought_opened=response.thought_opened)
        if not verdict.reward:
            return verdict.reason
        answer = answer.replace(ANSWER, "").replace(END_ANSWER, "")
    return "" if answer.strip() else "nothing follows the thought"


def _mixed_languages(
    response: TextResponse,
    prompt: Prompt,
    *,
    min_fraction: float = 0.95,
    target: str | None = None,
    part: str = "response",
) -> str:
    """Drop a response with less than `min_fraction` of its words in one language.

    Words are counted as by the language reward, so code, formulae, names and numbers are in no
    language.

    Returns:
        Why it is dropped, "" if it is kept.

    Raises:
        ValueError: other values."""
    text = _judged_part(response, part)
    _require_fraction("min_fraction", min_fraction)
    if target is not None and target not in LANGUAGE_NAMES:
        raise ValueError(f"target must be one of {', '.join(LANGUAGE_NAMES)}, got {target!r}")
    words = judged_words(text or "")
    if not words.total:
        return ""
    fractions = {name: getattr(words, name) / words.total for name in LANGUAGE_NAMES}
    prompt_target = prompt.fields.get("target")
    language = target or (
        prompt_target
        if prompt_target in [*LANGUAGE_NAMES]
        else max(fractions, key=lambda name: fractions[name])
    )
    if fractions[language] >= min_fraction:
        return ""
    return f"{fractions[language]:.0%} of its words are {LANGUAGE_NAMES[language]}"


def _long_paragraphs(
    response: TextResponse, prompt: Prompt, *, max_words: int = 300, part: str = "thought"
) -> str:
    """Drop a response with a paragraph of more than `max_words` words; a line break ends one.

    Words are separated by spaces, and may be numbers and formulae; 1.7 Chinese characters are one,
    so that a page counts alike in both languages. Code blocks are left to `code_blocks`.

    Raises:
        ValueError: the limit is not a positive number.
    """
    if isinstance(max_words, bool) or not isinstance(max_words, int | float) or max_words <= 0:
        raise ValueError(f"max_words must be a positive number, got {max_words!r}")
    text = FENCED_CODE.sub("\n", _judged_part(response, part) or "")
    longest = max((_num_words(paragraph) for paragraph in text.splitlines()), default=0.0)
    return f"a paragraph of {longest:,.0f} words" if longest > max_words else ""


def _num_words(paragraph: str) -> float:
    """Return the number of words in a paragraph, HAN_PER_WORD Han characters counted as one."""
    other_text, num_han = HAN_CHARACTER.subn(" ", paragraph)
    return len(re.findall(r"\S*\w\S*", other_text)) + num_han / HAN_PER_WORD


def code_blocks(
    response: TextResponse,
    prompt: Prompt,
    *,
    kinds: Sequence[str] = ("code",),
    part: str = "thought",
) -> str:
    """Drop a response with a fenced code block, also one that is never closed.

    Args:
        response: one response, whose `part` is searched.
        prompt: what it answers; its kind is looked up in `kinds`.
        kinds: the kinds of questions whose responses may have them.
        part: "thought" or "response".

    Raises:
        ValueError: kinds is no list."""
    if isinstance(kinds, str) or not all(isinstance(kind, str) for kind in kinds):
        raise ValueError(f"kinds must be a list of kinds of questions, got {kinds!r}")
    text = _judged_part(response, part)
    if prompt.kind in kinds or text is None:
        return ""
    return "a code block" if CODE_FENCE.search(text) else ""


def repetition(
    response: TextResponse, prompt: Prompt, *, min_new: float = 0.7, window: int = 50
) -> str:
    """Drop a response in which less than `min_new` of the windows of `window` characters are new
    (the repetition reward; a text written twice has half).

    Args:
        response: one response, of which the whole text counts.
        prompt: what it answers; every filter takes it, this one does not use it.
        min_new: the least share.
        window: the number of characters.

    Raises:
        ValueError: values out of range."""
    _require_fraction("min_new", min_new)
    verdict = grade("repetition", response.text, window=window)
    return verdict.reason if verdict.reward < min_new else ""


def _judged_part(response: TextResponse, part: object) -> str | None:
    """Return the thought, None without one; or the whole response with a line break for every tag.

    Raises:
        ValueError: another part.
    """
    if part == "thought":
        return response.thought
    if part != "response":
        raise ValueError(f"part must be one of {', '.join(FILTERED_TEXTS)}, got {part!r}")
    text = response.text
    for tag in (THINK, END_THINK, ANSWER, END_ANSWER):
        text = text.replace(tag, "\n")
    return text


def _require_fraction(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise ValueError(f"{name} must be above 0 and at most 1, got {value!r}")


Filter = Callable[..., str]
FILTERS: dict[str, Filter] = {
    "truncated": _cut_at_limit,
    "format": _broken_format,
    "language": _mixed_languages,
    "paragraphs": _long_paragraphs,
    "code_blocks": code_blocks,
    "repetition": repetition,
}
"""The filters, in the order in which they run; the first that objects gives the reason."""

Filters = Mapping[str, Mapping[str, Any]]


def first_objection(response: TextResponse, prompt: Prompt, filters: Filters) -> tuple[str, str]:
    """Return (filter, reason) of the first that drops the response; ("", "") if none does.

    Args:
        response: what the policy sampled; the filter reads its text.
        prompt: the prompt that it responds to.
        filters: the filters with their options, in order."""
    for name, options in filters.items():
        if name in FILTERS and (reason := FILTERS[name](response, prompt, **options)):
            return name, reason
    return "", ""


FILTER_FACTS, ROW_FIELDS = ("num_tokens", "is_truncated", "thought_opened"), ("target",)
"""The parts of a response and of a prompt's fields that filters get; tests of programs are not
sent."""


class PooledFilters:
    """Runs filters in the reward workers, which use all cores and survive a filter that crashes: a
    long response takes tens of milliseconds, too long for the controller's event loop."""

    def __init__(self, pool: RewardPool, filters: Filters) -> None:
        self._pool = pool
        self._filters = {name: dict(o) for name, o in filters.items() if name in FILTERS}

    async def __call__(self, prompt: Prompt, response: TextResponse) -> Decision | None:
        """Return why the response is dropped, None to keep it.

        Raises:
            UserError: a field of the prompt is not JSON.
            RunError: no reward worker can be started, or the pool is closed.
        """
        if not self._filters:
            return None
        fields = {name: prompt.fields[name] for name in ROW_FIELDS if name in prompt.fields}
        result = await self._pool.grade(
            f"{__name__}:grade_by_filters",
            response.text,
            None,
            facts={name: getattr(response, name) for name in FILTER_FACTS},
            prompt={"question": prompt.question, "kind": prompt.kind, "fields": fields},
            filters=self._filters,
        )
        if result.reward:
            return None
        return Decision(result.verdict or "unfiltered", result.reason)


def grade_by_filters(
    response: str, truth: object, *, facts: dict[str, Any], prompt: dict[str, Any], filters: Filters
) -> Grade:
    """Return 1 for a response that all filters keep, else 0 with the name of the filter that drops
    it as the verdict.

    Args:
        response: the text that the policy sampled.
        truth: the prompt's truth.
        facts: the other fields of the `TextResponse`.
        prompt: the other fields of the `Prompt`.
        filters: the filters, in order."""
    filtered = TextResponse(response, **facts)
    name, reason = first_objection(filtered, Prompt("", truth=truth, **prompt), filters)
    return Grade(0.0, reason, verdict=name) if name else Grade(1.0, "")
