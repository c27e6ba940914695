"""The recipes that `init` writes for examples and for judged responses: `sft`, `reward-model`."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from r1_grading.truths import is_none

from megatron_r1 import config as configuration
from megatron_r1.commands import recipe_sizes as sizes
from megatron_r1.commands import reward_model, sft
from megatron_r1.commands.init.draft import Draft, Source
from megatron_r1.commands.recipe_sizes import Guess
from megatron_r1.data.columns import columns_by_name
from megatron_r1.data.preferences import Kind, kind_of_rows, read_preferences
from megatron_r1.data.prompts import is_heldout
from megatron_r1.data.records import ABSENT, entry
from megatron_r1.data.scored_text import ScoredText
from megatron_r1.data.sft import ALWAYS_LEARNED, form_of
from megatron_r1.data.tokenizer import load_tokenizer

SUPERVISED_SIZES = ("checkpoint.every", "optimizer.learning_rate")
NO_CHAT = "the tokenizer has no chat template: User: …, Assistant:"
SCORED_TEMPLATE = "User: {question}\nAssistant: {response}\n"
HELDOUT_FRACTION = 0.1
"""The default of `reward_model.heldout_fraction`."""
MAX_ROWS = 20_000
"""The most rows of a reward model's data that are read."""


def draft(source: Source) -> Draft | None:
    """Return a recipe for rows that are responses with judgements, or examples to learn from; None
    for questions with truths."""
    if (kind := kind_of_rows(source.rows)) is not None:
        return _of_judged(source, kind)
    return _of_examples(source) if are_examples(source.rows) else None


def are_examples(rows: Sequence[dict[str, Any]]) -> bool:
    """Return whether rows are examples to learn from by `sft` and no questions with truths."""
    form = form_of(rows[0])
    if form is None or form in ALWAYS_LEARNED:
        return form is not None
    truth = columns_by_name(rows, needs_truth=True).get("truth", "truth")
    values = [entry({**row}, truth) for row in rows]
    has_truth = any(value is not ABSENT and not is_none(value) for value in values)
    return not has_truth and not any("kind" in row for row in rows)


def _of_examples(source: Source) -> Draft:
    def try_out(path: Path) -> None:
        recipe = configuration.load(path, required=sft.REQUIRED)
        sft.check_settings(recipe)
        *_, lines = sft.read_examples(recipe)
        print("\n".join(["", *lines]))

    guesses = [
        Guess("sft.data", source.data, f"rows of {form_of(source.rows[0])}"),
        Guess("sft.epochs", 2, "passes over the data; the paper: 2"),
        Guess("sft.batch_size", 8 if source.machine.is_cpu else 128, "examples per optimizer step"),
        *_supervised_sizes(source),
    ]
    if not _has_chat(source):
        guesses.append(Guess("sft.template", "plain", NO_CHAT))
    return Draft("sft", guesses, try_out)


def _of_judged(source: Source, kind: Kind) -> Draft:
    """Return a recipe for `reward-model`. Raises UserError for a row that it would refuse."""
    rows = list(itertools.islice(read_preferences(source.data, kind), MAX_ROWS))
    salt = reward_model.SPLIT_SALT
    sides = {is_heldout(row.question, HELDOUT_FRACTION, salt) for row in rows}
    form = "pairs of a chosen and a rejected response" if kind == "pairwise" else "labels"

    def try_out(path: Path) -> None:
        required, implied = reward_model.REQUIRED, reward_model.IMPLIED
        settings = configuration.load(path, implied, required=required).reward_model
        text = ScoredText(str(source.folder), settings.template, settings.shown, settings.max_chars)
        print(f"\n{len(rows):,} rows read; the first, as the reward model reads it:")
        for response, label in zip(rows[0].responses, rows[0].labels, strict=True):
            ids = text.encode(rows[0].question, response, rows[0].opened)
            shown = "no part that is scored" if ids is None else repr(text.decode(ids))[:400]
            print(f"  {'good' if label else 'bad'}: {shown}")

    guesses = [
        Guess("reward_model.data", source.data, f"rows of {form}"),
        Guess("reward_model.kind", kind, "pairwise: Bradley-Terry; pointwise: cross entropy"),
        Guess("reward_model.epochs", 1, "passes over the data; the paper: 1"),
        Guess("reward_model.batch_size", 8 if source.machine.is_cpu else 256, "the paper: 256"),
        *_supervised_sizes(source),
    ]
    if len(sides) < 2:
        why = "too few questions to hold some out: nothing is evaluated"
        guesses.append(Guess("reward_model.heldout_fraction", 0.0, why))
    if not _has_chat(source):
        guesses.append(Guess("reward_model.template", SCORED_TEMPLATE, NO_CHAT))
    return Draft("reward-model", guesses, try_out, has_dry_run=False)


def _supervised_sizes(source: Source) -> list[Guess]:
    layout = sizes.layout(source.hf, source.parameters, source.machine)
    batches = sizes.batches(source.parameters, 1, source.machine)
    return [
        *(guess for guess in layout if not guess.key.startswith(("rollout.", "push."))),
        *(guess for guess in batches if guess.key in SUPERVISED_SIZES),
    ]


def _has_chat(source: Source) -> bool:
    return bool(load_tokenizer(str(source.folder), "MODEL_FOLDER").chat_template)
