"""A draft of a recipe for `rl`, which `init` writes for rows that are questions with truths."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python
from r1_grading.rewards import ENVIRONMENT
from r1_grading.terms import DEFAULT_WEIGHTS

from megatron_r1.commands.init.recipe_draft import QuestionSource, RecipeDraft
from megatron_r1.commands.init.rl_trial import check_recipe, check_truths
from megatron_r1.commands.parts import guessed_settings
from megatron_r1.commands.parts.guessed_settings import Guess
from megatron_r1.commands.parts.node_resources import NodeResources
from megatron_r1.commands.parts.trained_model import trained_recipe
from megatron_r1.commands.parts.trained_template import template_of_model
from megatron_r1.config import infer_verb
from megatron_r1.data.chats import Message
from megatron_r1.data.columns import Columns, guess_columns
from megatron_r1.data.end_tokens import describe_end_tokens
from megatron_r1.data.prompt import is_heldout, normalize_question
from megatron_r1.data.prompt_reader import parse_question
from megatron_r1.data.prompt_tokenizer import PromptTokenizer
from megatron_r1.data.rows import read_canonical_rows
from megatron_r1.engines.server.model_config import max_positions

MODEL_ARGUMENT = "MODEL_FOLDER"
MAX_ROWS = 20_000
"""The most rows that are read for lengths and counts."""
COLUMN_ROWS = 100
"""Rows by which the columns are recognized."""
SMALL_MODEL_PARAMETERS = 1e9
"""Below so many parameters, a template is said to need worked examples."""
MIN_QUESTIONS_TO_SPLIT = 20
"""With fewer questions none is held out: a choice. A fifth of 20 are four."""
MAX_HELDOUT_ON_CPU, MAX_HELDOUT_ON_GPU = 64, 500
"""The most questions of an evaluation: a choice. With four responses to each, 256 and 2,000."""
AskedQuestion = tuple[list[Message], str]
"""The messages before a question, and the question."""


def rl_recipe(source: QuestionSource, choices: Mapping[str, str]) -> RecipeDraft:
    """Return a recipe for `rl`.

    Args:
        source: the model's folder and the first rows of its data.
        choices: the question, truth and kind that the user names.

    Raises:
        UserError: question or truth are not found.
    """
    columns = guess_columns(source.data, source.rows[:COLUMN_ROWS], **choices)
    if "kind" not in choices:
        columns = _kind_of_run(columns, source.folder)
    questions = _read_questions(source.data, columns)
    guesses = [
        *_guess_data_settings(source.data, source.rows, columns, len(questions)),
        *_guess_answers(source.folder, source.parameters),
    ]
    template = next(guess.value for guess in guesses if guess.key == "data.template")
    tokenizer = PromptTokenizer(str(source.folder), template, (MODEL_ARGUMENT, template))

    def try_out(path: Path) -> None:
        print(f"a response ends with: {describe_end_tokens(tokenizer.end_tokens)}")
        check_truths(source.data, columns)
        check_recipe(path, columns)

    return RecipeDraft("rl", [*guesses, *_guess_sizes(source, questions, tokenizer)], try_out)


def _guess_data_settings(
    data: str, rows: Sequence[dict[str, Any]], columns: Columns, num_questions: int
) -> list[Guess]:
    """Return the settings of `data` but for the template.

    Args:
        data: the data set, a path or a name.
        rows: rows of the data set.
        columns: the columns of question and truth.
        num_questions: how many different questions there are."""
    names = {"question": columns.question} | ({"truth": columns.truth} if columns.truth else {})
    column_names = {name: column for name, column in names.items() if name != column}
    if columns.kind and "kind" in rows[0]:
        # Else each row's kind would be read as the name of a reward.
        column_names["own_kind"] = "kind"
    column_reasons = "; ".join(f"{name} {columns.reasons.get(name, 'as given')}" for name in names)
    num_rows = f"{len(rows):,} rows" if len(rows) < MAX_ROWS else f"{MAX_ROWS:,} rows or more"
    if num_repeated := len(rows) - num_questions:
        num_rows += (
            f": {num_questions:,} different questions, and {num_repeated:,} that repeat one of "
            "them and are left out"
        )
    guesses = [Guess("data.path", data, num_rows)]
    if column_names:
        reason = f"our name: the file's column ({column_reasons})"
        guesses.append(Guess("data.columns", column_names, reason))
    if columns.kind:
        reason = columns.reasons.get("kind", "as given")
        guesses.append(Guess("data.kind", columns.kind, f"the reward: {reason}"))
    return guesses


def _kind_of_run(columns: Columns, folder: Path) -> Columns:
    """Return the columns with the reward of the RL run that made the model, in place of a guess.
    That of an environment would need the run's `agents`, which are not taken over."""
    recipe = trained_recipe(folder)
    run_kind = recipe.data.kind if recipe is not None and infer_verb(recipe) == "rl" else None
    if columns.kind is None or run_kind in (None, ENVIRONMENT):
        return columns
    reasons = columns.reasons | {"kind": f"as {folder.parent} trained the model"}
    return replace(columns, kind=run_kind, reasons=reasons)


def _read_questions(data: str, columns: Columns) -> list[AskedQuestion]:
    """Return the distinct questions of the rows that are read.

    Raises:
        UserError: a row without a question.
    """
    column_names = {"question": columns.question}
    questions: dict[str, AskedQuestion] = {}
    for location, row in itertools.islice(read_canonical_rows(data, column_names), MAX_ROWS):
        messages, question = parse_question(location, row)
        questions.setdefault(normalize_question(question, fold_case=False), (messages, question))
    return list(questions.values())


def _guess_answers(folder: Path, parameters: int) -> list[Guess]:
    """Return the settings for the template and for how answers are read. They are those of the RL
    run that made the model if there is one, else for a chat model or a base model.

    Args:
        folder: the model's Hugging Face folder.
        parameters: number of parameters of the model."""
    template, reason = template_of_model(folder, MODEL_ARGUMENT)
    recipe = trained_recipe(folder)
    if recipe is not None and infer_verb(recipe) == "rl":
        rewards = recipe.rewards.model_dump(include={"reading", "weights"})
        return [
            Guess("data.template", template, reason),
            Guess("rewards.reading", rewards["reading"], reason),
            Guess("rewards.weights", to_jsonable_python(rewards["weights"]), reason),
        ]
    if parameters < SMALL_MODEL_PARAMETERS:
        reason += (
            "; a model as small as this one often talks about the question instead of answering "
            "it: where the dry run shows that, write this template out, with one or two solved "
            "questions before {question} (docs/init.md, worked examples)"
        )
    weights = {name: weight for name, weight in DEFAULT_WEIGHTS.items() if name != "format"}
    return [
        Guess("data.template", template, reason),
        Guess(
            "rewards.reading",
            "auto",
            "<answer> tags, a box, or the last line, whichever is there; R1-Zero: strict, with "
            "data.template: r1_zero",
        ),
        Guess(
            "rewards.weights", weights, "R1-Zero adds format: 0.1, for <think> and <answer> tags"
        ),
    ]


def _guess_sizes(
    source: QuestionSource, questions: Sequence[AskedQuestion], tokenizer: PromptTokenizer
) -> list[Guess]:
    """Return the settings that depend on the model's size, the prompts and the node."""
    node = source.node
    limits = guessed_settings.guess_lengths(
        max(len(tokenizer.encode(question, messages)) for messages, question in questions),
        max_positions(source.folder),
        node,
    )
    num_heldout, heldout = _guess_heldout([question for _, question in questions], node)
    return [
        *guessed_settings.guess_layout(source.hf_config, source.parameters, node),
        *limits,
        *guessed_settings.guess_batches(source.parameters, len(questions) - num_heldout, node),
        *heldout,
    ]


def _guess_heldout(questions: Sequence[str], node: NodeResources) -> tuple[int, list[Guess]]:
    """Return how many questions are held out, with the settings for held-out questions and for
    their evaluation."""
    if len(questions) < MIN_QUESTIONS_TO_SPLIT:
        reason = f"{len(questions)} questions are too few to hold some out: nothing is evaluated"
        return 0, [Guess("data.heldout_fraction", 0.0, reason)]
    fraction = 0.2 if len(questions) < 10 * MIN_QUESTIONS_TO_SPLIT else 0.1
    limit = MAX_HELDOUT_ON_CPU if node.is_cpu else MAX_HELDOUT_ON_GPU
    count = sum(is_heldout(question, fraction) for question in questions)
    guesses = [
        Guess("data.heldout_fraction", fraction, f"{min(count, limit)} questions, for evaluation"),
        Guess("eval.every", 10, "steps between evaluations"),
        Guess("eval.samples", 4, "responses to each of these; the paper: 16"),
    ]
    if count > limit:
        reason = f"of {count:,}, to evaluate in little time"
        guesses.append(Guess("data.num_heldout", limit, reason))
    return count, guesses
