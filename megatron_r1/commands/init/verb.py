"""Writes a recipe for a model and your questions: columns, template, lengths and layout are
guessed.

`megatron-r1 init MODEL_FOLDER DATA [--out RECIPE.yaml] [--question COLUMN] [--truth COLUMN]
[--kind REWARD]`. DATA is a .jsonl, .json, .csv or .parquet file, hub:NAME[:CONFIG][:SPLIT] or a
folder. Comments of the recipe give the reason of each value; `rl RECIPE.yaml --dry-run` then tries
it."""

import itertools
import shlex
from collections.abc import Sequence
from pathlib import Path

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.base.files import atomic_write
from megatron_r1.commands.init.recipe_draft import QuestionSource, RecipeDraft, recipe_text
from megatron_r1.commands.init.rl_draft import MAX_ROWS, MODEL_ARGUMENT, rl_recipe
from megatron_r1.commands.init.supervised_drafts import supervised_recipe
from megatron_r1.commands.parts.guessed_settings import Guess, yaml_value_text
from megatron_r1.commands.parts.node_resources import detect_node_resources
from megatron_r1.commands.parts.trained_model import find_exported
from megatron_r1.config import Config
from megatron_r1.data.rows import read_canonical_rows
from megatron_r1.evaluation.model_folder import require_weights
from megatron_r1.models import read_hf_config
from megatron_r1.models.support_checks import check_supported
from megatron_r1.models.weights import num_parameters

ARGUMENTS = ("MODEL_FOLDER", "DATA")
OPTIONS = {"out": "RECIPE.yaml", "question": "COLUMN", "truth": "COLUMN", "kind": "REWARD"}
SETTINGS = ()


def run(config: Config, model: str, data: str, out: str | None = None, **choices: str) -> None:
    """Write the recipe and print it.

    Args:
        config: not used; every such verb has this parameter.
        model: the model's folder, or the run that made it.
        data: the file of rows.
        out: the recipe's file; None: named after the data.
        **choices: the question, truth and kind that the user names.

    Raises:
        UserError: naming what is missing, before the recipe is written, and for a recipe that its
            verb would refuse."""
    path = Path(out or f"{Path(data.removeprefix('hub:').split(':')[0]).stem}.yaml")
    _check_arguments(model, path)
    folder = find_exported(model, MODEL_ARGUMENT)
    hf_config = read_hf_config(folder, key=MODEL_ARGUMENT)
    check_supported(hf_config)
    require_weights(folder, MODEL_ARGUMENT)
    rows = [row for _, row in itertools.islice(read_canonical_rows(data), MAX_ROWS)]
    if not rows:
        raise UserError(f"{data}: it holds no rows", key=ARGUMENTS[1], cause=Cause.EMPTY)
    source = QuestionSource(
        folder, hf_config, num_parameters(hf_config), data, rows, detect_node_resources()
    )
    draft = None if choices else supervised_recipe(source)
    options = [text for key, value in choices.items() for text in (f"--{key}", value)]
    _write_recipe(path, source, draft or rl_recipe(source, choices), [model, data, *options])


def _write_recipe(
    path: Path, source: QuestionSource, draft: RecipeDraft, arguments: Sequence[str]
) -> None:
    """Write a recipe and print it, then try it out and print what comes next.

    Args:
        path: the recipe's file.
        source: where its questions come from.
        draft: its settings.
        arguments: the command line of `init`.

    Raises:
        UserError: the recipe is refused; it has the command that repeats the trial."""
    command = f"megatron-r1 {draft.verb} {shlex.quote(str(path))}"
    trial = f"{command} --dry-run" if draft.has_dry_run else command
    size = f"{source.hf_config['architectures'][0]}, {source.parameters / 1e6:,.1f}M parameters"
    guesses = [
        Guess("run.folder", f"runs/{path.stem}", "everything that the run writes"),
        Guess("model.path", str(source.folder), size),
        *draft.guesses,
    ]
    title = (
        f"Written by: megatron-r1 init {shlex.join(arguments)}",
        *([f"Try it: {trial}"] if draft.has_dry_run else []),
        f"Train:  {command}",
        "Every other setting: megatron-r1 keys",
        "A comment says why init chose the value below it, not what you change it to.",
    )
    atomic_write(path, recipe_text(title, guesses))
    for guess in guesses:
        print(f"{guess.key}: {yaml_value_text(guess.value)}   # {guess.reason}")
    try:
        draft.try_out(path)
    except UserError as error:
        raise UserError(
            f"{path} is written, but {draft.verb} does not run it yet: {error}\nthen: {trial}",
            key=error.key,
            cause=error.cause,
        ) from None
    print(f"\n{path} is written: look at it, then {trial}")


def _check_arguments(model: str, path: Path) -> None:
    if Path(model).is_file():
        raise UserError(
            f"{MODEL_ARGUMENT} {model}: it is a file; the order is megatron-r1 init "
            f"{' '.join(ARGUMENTS)}",
            key=MODEL_ARGUMENT,
            cause=Cause.MALFORMED,
        )
    if path.is_dir():
        raise UserError(
            f"{path} is a folder; give a file, as --out {path / 'recipe.yaml'}",
            key="--out",
            cause=Cause.MALFORMED,
        )
    if path.exists():
        raise UserError(
            f"{path} exists already; remove it, or give --out ANOTHER.yaml",
            key="--out",
            cause=Cause.EXISTS,
        )
