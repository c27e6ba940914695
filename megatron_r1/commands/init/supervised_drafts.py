"""Drafts of recipes for `sft` and `reward-model`, which `init` writes for rows that are examples or
responses with judgements."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from r1_grading.truths import is_missing

from megatron_r1 import config as configuration
from megatron_r1.commands import reward_model, sft
from megatron_r1.commands.init.recipe_draft import QuestionSource, RecipeDraft
from megatron_r1.commands.parts import guessed_settings
from megatron_r1.commands.parts.guessed_settings import Guess
from megatron_r1.data.columns import columns_by_name
from megatron_r1.data.preference_tokenizer import PreferenceTokenizer
from megatron_r1.data.preferences import Kind, kind_of_rows, read_preferences
from megatron_r1.data.prompt import is_heldout
from megatron_r1.data.rows import ABSENT_VALUE, lookup_column
from megatron_r1.data.sft import ALWAYS_LEARNED, find_form
from megatron_r1.data.tokenizer import load_tokenizer

SUPERVISED_SIZES = ("checkpoint.every", "optimizer.learning_rate")
NO_CHAT = "the tokenizer has no chat template: User: …, Assistant:"
SCORED_TEMPLATE = "User: {question}\nAssistant: {response}\n"
HELDOUT_FRACTION = 0.1
"""The default of `reward_model.heldout_fraction`."""
MAX_JUDGED_ROWS = 20_000
"""The most rows of a reward model's data that are read."""


def supervised_recipe(source: QuestionSource) -> RecipeDraft | None:
    """Return a recipe for rows that are responses with judgements, or examples to learn from; None
    for questions with truths."""
    if (kind := kind_of_rows(source.rows)) is not None:
        return _reward_model_recipe(source, kind)
    return _sft_recipe(source) if are_examples(source.rows) else None


def are_examples(rows: Sequence[dict[str, Any]]) -> bool:
    """Return whether rows are examples to learn from by `sft` and no questions with truths."""
    form = find_form(rows[0])
    if form is None or form in ALWAYS_LEARNED:
        return form is not None
    truth = columns_by_name(rows, needs_truth=True).get("truth", "truth")
    values = [lookup_column({**row}, truth) for row in rows]
    has_truth = any(value is not ABSENT_VALUE and not is_missing(value) for value in values)
    return not has_truth and not any("kind" in row for row in rows)


def _sft_recipe(source: QuestionSource) -> RecipeDraft:
    def try_out(path: Path) -> None:
        recipe = configuration.load_recipe(path, required=sft.REQUIRED_KEYS)
        sft.check_sft_settings(recipe)
        *_, lines = sft.read_examples(recipe)
        print("\n".join(["", *lines]))

    guesses = [
        Guess("sft.data", source.data, f"rows of {find_form(source.rows[0])}"),
        Guess("sft.epochs", 2, "passes over the data; the paper: 2"),
        Guess("sft.batch_size", 8 if source.node.is_cpu else 128, "examples per optimizer step"),
        *_supervised_sizes(source),
    ]
    if not _has_chat(source):
        guesses.append(Guess("sft.template", "plain", NO_CHAT))
    return RecipeDraft("sft", guesses, try_out)


def _reward_model_recipe(source: QuestionSource, kind: Kind) -> RecipeDraft:
    """Return a recipe for `reward-model`.

    Raises:
        UserError: a row that `reward-model` would refuse.
    """
    rows = list(itertools.islice(read_preferences(source.data, kind), MAX_JUDGED_ROWS))
    salt = reward_model.SPLIT_SALT
    sides = {is_heldout(row.question, HELDOUT_FRACTION, salt) for row in rows}
    form = "pairs of a chosen and a rejected response" if kind == "pairwise" else "labels"

    def try_out(path: Path) -> None:
        required_keys, implied_settings = reward_model.REQUIRED_KEYS, reward_model.IMPLIED_SETTINGS
        settings = configuration.load_recipe(
            path, implied_settings, required=required_keys
        ).reward_model
        text = PreferenceTokenizer(
            str(source.folder), settings.template, settings.scored_part, settings.max_chars
        )
        print(f"\n{len(rows):,} rows read; the first, as the reward model reads it:")
        for response, label in zip(rows[0].responses, rows[0].labels, strict=True):
            ids = text.encode(rows[0].question, response, rows[0].thought_opened)
            part_text = "no part that is scored" if ids is None else repr(text.decode(ids))[:400]
            print(f"  {'good' if label else 'bad'}: {part_text}")

    guesses = [
        Guess("reward_model.data", source.data, f"rows of {form}"),
        Guess("reward_model.kind", kind, "pairwise: Bradley-Terry; pointwise: cross entropy"),
        Guess("reward_model.epochs", 1, "passes over the data; the paper: 1"),
        Guess("reward_model.batch_size", 8 if source.node.is_cpu else 256, "the paper: 256"),
        *_supervised_sizes(source),
    ]
    if len(sides) < 2:
        reason = "too few questions to hold some out: nothing is evaluated"
        guesses.append(Guess("reward_model.heldout_fraction", 0.0, reason))
    if not _has_chat(source):
        guesses.append(Guess("reward_model.template", SCORED_TEMPLATE, NO_CHAT))
    return RecipeDraft("reward-model", guesses, try_out, has_dry_run=False)


def _supervised_sizes(source: QuestionSource) -> list[Guess]:
    layout = guessed_settings.guess_layout(source.hf_config, source.parameters, source.node)
    batches = guessed_settings.guess_batches(source.parameters, 1, source.node)
    return [
        *(guess for guess in layout if not guess.key.startswith(("rollout.", "push."))),
        *(guess for guess in batches if guess.key in SUPERVISED_SIZES),
    ]


def _has_chat(source: QuestionSource) -> bool:
    return bool(load_tokenizer(str(source.folder), "MODEL_FOLDER").chat_template)
