"""The samples on a page: the same run at its beginning, in the middle and at the end, an episode of
several turns as a conversation."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from r1_grading.truths import truth_answer

from megatron_r1.reporting.formatting import format_count, make_printable, shorten_middle
from megatron_r1.reporting.record_values import finite_metric, is_correct, prompt_question

NUM_QUESTIONS = 3
MAX_CHARACTERS, MAX_TURN_CHARACTERS = 6000, 2000
MAX_TURNS = 40
"""Turns shown; of a longer episode the first and the last ones."""
CALL = re.compile(r"(<tool_call>.*?</tool_call>)", re.DOTALL)
ROLE_NAMES = {1: ("",), 2: ("beginning", "end"), 3: ("beginning", "middle", "end")}

SampleLine = Mapping[str, Any]


@dataclass(frozen=True)
class ShownTurn:
    """One message.

    Attributes:
        role: who says it.
        is_trained: whether the policy sampled it and is trained on it.
        details: its tokens, whether they were trained or given, and the policy that sampled them.
        text: (tag, text) segments; tag: "", i (faint) or b (a tool call)."""

    role: str
    is_trained: bool
    details: str
    text: list[tuple[str, str]]


@dataclass(frozen=True)
class Card:
    """One sample as the page shows it.

    Attributes:
        question: its last line, or all of it where it is short.
        truth: what it was graded against.
        is_correct: whether it is right.
        details: its reward, length and the like, as text.
        response: (tag, text) segments; tag: "", i (faint) or b.
        reason: why the grade is as it is.
        turns: the turns of an episode, shown instead of the response."""

    question: str
    truth: str | None
    is_correct: bool
    details: list[str]
    response: list[tuple[str, str]]
    reason: str
    turns: list[ShownTurn]


@dataclass(frozen=True)
class SamplesSection:
    """Samples to show: either `by_question`, each question with the (moment, sample) of several
    moments, or `by_moment`, the samples of each moment."""

    intro: str
    by_question: list[tuple[Card, list[tuple[str, Card]]]] = field(default_factory=list)
    by_moment: list[tuple[str, list[Card]]] = field(default_factory=list)


def choose_samples(read_samples: Callable[[], Iterator[SampleLine]]) -> SamplesSection | None:
    """Return the samples to show, or None without any.

    Held-out questions that were asked at several steps are shown side by side; without them, the
    first samples of three training steps.

    Args:
        read_samples: returns a fresh pass over the samples; called twice."""
    steps: dict[str, set[int]] = {"eval": set(), "train": set()}
    for sample in read_samples():
        steps.setdefault(str(sample.get("split", "train")), set()).add(int(sample["step"]))
    split = "eval" if len(steps["eval"]) > 1 or not steps["train"] else "train"
    moments = sorted(steps[split])
    if not moments:
        return None
    if len(moments) > 3:
        moments = [moments[0], moments[len(moments) // 2], moments[-1]]
    by_step: dict[int, list[SampleLine]] = {step: [] for step in moments}
    for sample in read_samples():
        if sample.get("split", "train") == split and sample["step"] in by_step:
            by_step[sample["step"]].append(sample)
    if split == "eval" and len(moments) > 1:
        intro = "The same held-out questions at each moment; of several responses, the first."
        if by_question := _same_questions(by_step):
            return SamplesSection(intro, by_question=by_question)
    else:
        intro = f"The first {NUM_QUESTIONS} samples recorded at each moment."
    by_moment = [
        (
            _describe_step(by_step, step),
            [
                _sample_card(group[0])
                for group in [*_samples_by_question(samples).values()][:NUM_QUESTIONS]
            ],
        )
        for step, samples in by_step.items()
    ]
    return SamplesSection(intro, by_moment=by_moment)


def _same_questions(
    by_step: Mapping[int, Sequence[SampleLine]],
) -> list[tuple[Card, list[tuple[str, Card]]]]:
    """Return the first questions that were asked at every step, with their first responses."""
    questions_by_step = {step: _samples_by_question(samples) for step, samples in by_step.items()}
    first_group, *later_groups = questions_by_step.values()
    shared_questions = [
        question for question in first_group if all(question in group for group in later_groups)
    ]
    return [
        (
            _sample_card(first_group[question][0]),
            [
                (
                    _describe_step(by_step, step, questions[question]),
                    _sample_card(questions[question][0]),
                )
                for step, questions in questions_by_step.items()
            ],
        )
        for question in shared_questions[:NUM_QUESTIONS]
    ]


def _samples_by_question(samples: Iterable[SampleLine]) -> dict[str, list[SampleLine]]:
    samples_by_question: dict[str, list[SampleLine]] = defaultdict(list)
    for sample in samples:
        samples_by_question[str(sample.get("question", ""))].append(sample)
    return samples_by_question


def _describe_step(
    by_step: Mapping[int, Any], step: int, answers: Sequence[SampleLine] = ()
) -> str:
    name = ROLE_NAMES[len(by_step)][list(by_step).index(step)]
    text = f"{name}, step {step}" if name else f"step {step}"
    if len(answers) > 1:
        text += f" · {sum(map(is_correct, answers))} of {len(answers)} responses right"
    return text


def _sample_card(sample: SampleLine) -> Card:
    truth = sample.get("truth")
    reward = finite_metric(sample, "reward")
    length = finite_metric(sample, "length")
    details = [
        "" if reward is None else f"reward {reward:.3g}",
        "" if length is None else f"{length:.0f} tokens",
        make_printable(sample.get("status") or ""),
    ]
    return Card(
        question=make_printable(prompt_question(sample.get("question", ""))),
        truth=None if truth is None else make_printable(truth_answer(truth))[:200],
        is_correct=is_correct(sample),
        details=[detail for detail in details if detail],
        response=list(_colored_segments(str(sample.get("response", "")))),
        reason=make_printable(sample.get("reason") or ""),
        turns=conversation_turns(sample),
    )


def _colored_segments(text: str) -> Iterator[tuple[str, str]]:
    """Yield the chain of thought plain, its tags faint, the answer in the color of the verdict."""
    text = make_printable(shorten_middle(text, MAX_CHARACTERS).strip(), keep_newlines=True)
    if not text:
        yield "i", "(empty)"
    tags: dict[int, str] = {}
    if (start := text.rfind("<think>")) >= 0:
        tags |= {start: "<think>", text.find("</think>"): "</think>\n"}
    answer = range(0)
    if (start := text.rfind("<answer>")) >= 0:
        end = text.find("</answer>", start)
        tags |= {start: "<answer>", end: "</answer>"}
        answer = range(start, end if end >= 0 else len(text))
    tags.pop(-1, None)  # a closing tag that is not there
    position = 0
    for tag_start, tag in [*sorted(tags.items()), (len(text), "")]:
        if position < tag_start:
            yield "b" if position in answer else "", text[position:tag_start]
        if tag:
            yield "i", tag
        position = tag_start + len(tag.strip())


def conversation_turns(sample: Mapping[str, Any]) -> list[ShownTurn]:
    """Return the turns of a line of samples.jsonl; empty for a single turn."""
    turns = sample.get("turns")
    if not isinstance(turns, list):
        return []
    messages = [_shown_turn(turn) for turn in turns if isinstance(turn, Mapping)]
    if len(messages) <= MAX_TURNS:
        return messages
    half = MAX_TURNS // 2
    gap = ShownTurn("…", False, f"{len(messages) - 2 * half:,} turns left out", [])
    return [*messages[:half], gap, *messages[-half:]]


def _shown_turn(turn: Mapping[str, Any]) -> ShownTurn:
    is_trained, tokens = bool(turn.get("trained")), finite_metric(turn, "tokens")
    version = finite_metric(turn, "policy_version")
    details = [
        "" if tokens is None else format_count(int(tokens), "token"),
        "trained" if is_trained else "given",
        "" if version is None else f"policy {version:.0f}",
    ]
    return ShownTurn(
        make_printable(turn.get("role", "")),
        is_trained,
        " · ".join(detail for detail in details if detail),
        list(_turn_segments(str(turn.get("text") or ""))),
    )


def _turn_segments(text: str) -> Iterator[tuple[str, str]]:
    text = make_printable(shorten_middle(text, MAX_TURN_CHARACTERS).strip(), keep_newlines=True)
    if not text:
        yield "i", "(empty)"
    for part in CALL.split(text):
        if part:
            yield "b" if CALL.fullmatch(part) else "", part
