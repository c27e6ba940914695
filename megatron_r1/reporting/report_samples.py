"""The samples of a report: the same run at its beginning, in the middle and at the end."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

from megatron_r1.reporting.wording import finite, is_right, last_line, printable

NUM_QUESTIONS = 3
MAX_CHARACTERS = 6000
NAMES = {1: ("",), 2: ("beginning", "end"), 3: ("beginning", "middle", "end")}

Sample = Mapping[str, Any]


def samples_section(read: Callable[[], Iterator[Sample]]) -> str:
    """HTML of the samples, or "" without any. read: a fresh pass over them, called twice.

    Held-out questions that were asked again and again are shown side by side; without them, the
    first samples of three training steps.
    """
    steps: dict[str, set[int]] = {"eval": set(), "train": set()}
    for sample in read():
        steps.setdefault(str(sample.get("split", "train")), set()).add(int(sample["step"]))
    split = "eval" if len(steps["eval"]) > 1 or not steps["train"] else "train"
    moments = _moments(sorted(steps[split]))
    if not moments:
        return ""
    by_step: dict[int, list[Sample]] = {step: [] for step in moments}
    for sample in read():
        if sample.get("split", "train") == split and sample["step"] in by_step:
            by_step[sample["step"]].append(sample)
    if split == "eval" and len(moments) > 1:
        intro = "The same held-out questions at each moment; of several answers, the first."
        body = _same_questions(by_step)
    else:
        intro = f"The first {NUM_QUESTIONS} samples recorded at each moment."
        body = _columns(by_step)
    return f"<h2>Samples</h2><p>{intro}</p>{body}"


def _moments(steps: Sequence[int]) -> list[int]:
    if len(steps) <= 3:
        return list(steps)
    return [steps[0], steps[len(steps) // 2], steps[-1]]


def _same_questions(by_step: Mapping[int, Sequence[Sample]]) -> str:
    grouped = {step: _by_question(samples) for step, samples in by_step.items()}
    everywhere = [
        question
        for question in next(iter(grouped.values()))
        if all(question in questions for questions in grouped.values())
    ]
    if not everywhere:
        return _columns(by_step)
    rows = []
    for question in everywhere[:NUM_QUESTIONS]:
        answers = [questions[question] for questions in grouped.values()]
        cards = [
            f"<div>{_moment(by_step, step, samples)}{_card(samples[0])}</div>"
            for step, samples in zip(grouped, answers, strict=True)
        ]
        rows.append(_question(answers[0][0]) + f'<div class="samples">{"".join(cards)}</div>')
    return "".join(rows)


def _columns(by_step: Mapping[int, Sequence[Sample]]) -> str:
    columns = []
    for step, samples in by_step.items():
        first = [of_question[0] for of_question in _by_question(samples).values()]
        cards = [_question(sample) + _card(sample) for sample in first[:NUM_QUESTIONS]]
        columns.append(f"<div>{_moment(by_step, step)}{''.join(cards)}</div>")
    return f'<div class="samples">{"".join(columns)}</div>'


def _by_question(samples: Iterable[Sample]) -> dict[str, list[Sample]]:
    grouped: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        grouped[str(sample.get("question", ""))].append(sample)
    return grouped


def _moment(by_step: Mapping[int, Any], step: int, answers: Sequence[Sample] = ()) -> str:
    name = NAMES[len(by_step)][list(by_step).index(step)]
    text = f"{name}, step {step}" if name else f"step {step}"
    if len(answers) > 1:
        text += f" · {sum(map(is_right, answers))} of {len(answers)} answers right"
    return f'<p class="moment">{text}</p>'


def _question(sample: Sample) -> str:
    question = printable(last_line(sample.get("question", "")))
    truth = sample.get("truth")
    known = "" if truth is None else f"<small>answer: {escape(printable(truth)[:200])}</small>"
    return f'<p class="question">{escape(question)}{known}</p>'


def _card(sample: Sample) -> str:
    right = is_right(sample)
    reward, length = finite(sample, "reward"), finite(sample, "length")
    details = [
        "" if reward is None else f"reward {reward:.3g}",
        "" if length is None else f"{length:.0f} tokens",
    ]
    header = "".join(f"<span>{detail}</span>" for detail in details if detail)
    reason = escape(printable(sample.get("reason") or ""))
    return (
        f'<article class="sample{" right" if right else ""}"><header>'
        f'<span class="verdict">{"✓ right" if right else "✗ wrong"}</span>{header}</header>'
        f'<div class="response">{_response(str(sample.get("response", "")))}</div>'
        f"<footer>{reason}</footer></article>"
    )


def _response(text: str) -> str:
    """The chain of thought plain, its tags faint, the answer in the colour of the verdict."""
    if len(text) > MAX_CHARACTERS:
        half = MAX_CHARACTERS // 2
        left_out = f"\n[… {len(text) - MAX_CHARACTERS:,} characters left out …]\n"
        text = text[:half] + left_out + text[-half:]
    html = escape(printable(text.strip(), keep_newlines=True)) or "<i>(empty)</i>"
    for tag in ("think", "answer"):
        opening, closing = f"&lt;{tag}&gt;", f"&lt;/{tag}&gt;"
        before, found, after = html.rpartition(opening)
        if tag == "answer" and found:
            answer, closed, rest = after.partition(closing)
            html = f"{before}<i>{found}</i><b>{answer}</b><i>{closed}</i>{rest}"
        elif found:
            html = f"{before}<i>{found}</i>{after}"
            html = html.replace(closing, f"<i>{closing}</i>\n", 1)
    return html
