"""Benchmarks of multiple choice, whose answers are letters.

They are MMLU (14,042 questions from 57 subjects, Hendrycks et al., 2009.03300) and GPQA Diamond
(198 graduate-level ones, Rein et al., 2311.12022). GPQA has the right choice in a column of its
own. The choices are shuffled once per question, by its id and a seed, so that every sample and
every run has the same order."""

import random
from collections.abc import Iterator, Sequence
from typing import Any

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.data.rows import require_text
from megatron_r1.evaluation.benchmarks.base import Benchmark, Options, Question, Rows, pick_columns

CHOICE_LETTERS = "ABCDEFGHIJ"
CHOICE_INSTRUCTION = (
    "Answer the following multiple choice question. Please reason step by step, and put only "
    "the letter of your final answer within \\boxed{}.\n\n{question}"
)
MMLU_LAYOUT = {name: name for name in ("question", "subject", "choices", "answer")}
CHOICES = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
GPQA_LAYOUT = {name: name for name in ("Record ID", "Question", *CHOICES)}


def _mmlu_questions(rows: Rows, options: Options) -> Iterator[Question]:
    """Yield the questions of the subjects in `options`.

    Raises:
        UserError: an unknown subject.
    """
    subjects, known_subjects = set(options["subjects"]), set()
    for location, row in rows:
        columns = pick_columns(location, row, [MMLU_LAYOUT])
        known_subjects.add(columns["subject"])
        if subjects and columns["subject"] not in subjects:
            continue
        choices = columns["choices"]
        if not isinstance(choices, list) or not 2 <= len(choices) <= len(CHOICE_LETTERS):
            raise UserError(
                f"{location}: 'choices' must be a list of texts, got {choices!r}",
                key="choices",
                cause=Cause.MALFORMED,
            )
        question = require_text(location, columns, "question").strip()
        letter = _answer_letter(location, columns["answer"], len(choices))
        yield Question("", _text_with_choices(question, choices), "math", letter)
    if unknown := sorted(subjects - known_subjects):
        raise UserError(
            f"mmlu has no subject {unknown[0]!r}; it has {', '.join(sorted(known_subjects))}",
            key="options.subjects",
            cause=Cause.UNKNOWN,
        )


def _gpqa_questions(rows: Rows, options: Options) -> Iterator[Question]:
    """Yield the questions, each with its choices in an order of its own."""
    for location, row in rows:
        columns = pick_columns(location, row, [GPQA_LAYOUT])
        question_id = str(columns["Record ID"])
        choices = [require_text(location, columns, name).strip() for name in CHOICES]
        order = list(range(len(choices)))
        random.Random(f"gpqa/{options['seed']}/{question_id}").shuffle(order)
        question = require_text(location, columns, "Question").strip()
        text = _text_with_choices(question, [choices[index] for index in order])
        yield Question(question_id, text, "math", CHOICE_LETTERS[order.index(0)])


def _text_with_choices(question: str, choices: Sequence[str]) -> str:
    """Return the question with its choices as "A) …" lines."""
    lines = [f"{letter}) {choice}" for letter, choice in zip(CHOICE_LETTERS, choices, strict=False)]
    return "\n".join([question, "", *lines])


def _answer_letter(location: str, answer: Any, num_choices: int) -> str:
    """Return the letter of an answer: the data set has 0 to 3, exports of it the letter."""
    letters = list(CHOICE_LETTERS[:num_choices])
    if isinstance(answer, str) and answer.strip().upper() in letters:
        return answer.strip().upper()
    if isinstance(answer, int) and 0 <= answer < num_choices:
        return letters[answer]
    raise UserError(
        f"{location}: 'answer' must be 0 to {num_choices - 1} or a letter, got {answer!r}",
        key="answer",
        cause=Cause.OUT_OF_RANGE,
    )


MMLU = Benchmark(
    _mmlu_questions,
    CHOICE_INSTRUCTION,
    hubs={"cais/mmlu": lambda options: ["all/test-*.parquet"]},
    options={"subjects": []},  # such as [abstract_algebra]; [] for all
)
GPQA_DIAMOND = Benchmark(
    _gpqa_questions,
    CHOICE_INSTRUCTION,
    hubs={"Idavidrein/gpqa": lambda options: ["gpqa_diamond.csv"]},
    options={"seed": 0},
)
