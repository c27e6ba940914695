"""The prompts that an RL run may draw, with the tokenizer that they go through: read, cut to those
that fit, and reported on."""

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from r1_grading.base.errors import shorten
from r1_grading.rewards import GRADERS, SERVED_REWARDS
from r1_grading.terms import RewardUnusable

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.commands.rl_checks import check_rl_settings
from megatron_r1.config import Config
from megatron_r1.data.prompt_split import PromptSplit
from megatron_r1.data.prompt_tokenizer import PromptTokenizer
from megatron_r1.data.prompts import load_prompts, prompt_options
from megatron_r1.engines.server.model_config import max_model_len
from megatron_r1.reporting.formatting import format_count, make_printable, shorten_middle

MAX_SHOWN_IDS = 8
"""Token ids that are shown of either end of a prompt."""


def check_and_read_prompts(config: Config) -> tuple[PromptTokenizer, PromptSplit]:
    """Check all that can be checked before anything starts; return the tokenizer with its template,
    and the prompts.

    Raises:
        UserError: a mistake in the recipe or its data.
    """
    # In the order of what a check needs: settings, then the tokenizer, which the environment's
    # check renders with, then the prompts, whose lengths the tokenizer measures. So a mistake in
    # a setting is reported without reading the data, which may be large.
    check_rl_settings(config)
    return read_prompts(config)


def read_prompts(config: Config) -> tuple[PromptTokenizer, PromptSplit]:
    """Return the recipe's prompts and how they become tokens, of settings that have been checked.

    Raises:
        UserError: unreadable data, no prompt that fits, or an environment that cannot be used.
    """
    ids = config.rollout.stop_token_ids
    tokenizer = PromptTokenizer(config.model.path, config.data.template, stop_token_ids=ids)
    if config.agents.player_settings:
        from megatron_r1.controller.rollouts.players import check_player

        check_player(config, tokenizer)
    return tokenizer, _load_prompts(config, tokenizer)


def _load_prompts(config: Config, tokenizer: PromptTokenizer) -> PromptSplit:
    """Return the prompts of the recipe that an engine has room for, and print what is unusual about
    the data.

    Raises:
        UserError: the data cannot be read, or no prompt is left.
    """
    options = prompt_options(config.data)
    if config.agents.player_settings:
        from megatron_r1.agents.environment_prompts import load_run_prompts

        prompts = load_run_prompts(config.agents, **options)
    else:
        prompts = load_prompts(**options)
    if prompts.contradictions and config.data.task is None:
        earlier, later = prompts.contradictions[0]
        print(
            f"{config.data.path}: {format_count(len(prompts.contradictions), 'row')} left out, "
            f"whose question has another truth before: {shorten(earlier.question)!r} has "
            f"{shorten(repr(earlier.truth))}, which counts, and {shorten(repr(later.truth))}",
            file=sys.stderr,
        )
    show_padded_truths(config.data.path or config.data.task or "data", prompts)
    prompts = drop_long_prompts(prompts, tokenizer, max_model_len(config))
    for line in _describe_rows(prompts, tokenizer):
        print(line)
    per_rollout = config.rl.prompts_per_rollout
    if per_rollout > len(prompts.train):
        print(
            f"rl.prompts_per_rollout: {per_rollout} is more than the {len(prompts.train):,} "
            "questions to train on: a rollout has some of them several times",
            file=sys.stderr,
        )
    if not prompts.heldout:
        print(
            "no held-out questions, so nothing will be evaluated: raise data.heldout_fraction or "
            "give data.heldout_path",
            file=sys.stderr,
        )
    return prompts


def show_padded_truths(source: str, prompts: PromptSplit) -> None:
    """Print how many truths have spaces at an end, which a reward of the user's own may compare.

    Args:
        source: the file or the task.
        prompts: those to train on and held out, with their truths."""
    padded = [
        prompt
        for prompt in prompts.train + prompts.heldout
        if prompt.kind not in GRADERS | SERVED_REWARDS
        and isinstance(prompt.truth, str)
        and prompt.truth != prompt.truth.strip()
    ]
    if padded:
        first = padded[0]
        verb = "begins or ends" if len(padded) == 1 else "begin or end"
        print(
            f"{source}: {format_count(len(padded), 'truth')} {verb} with a space, which "
            f"{first.kind} gets with it: {shorten(first.question)!r} has "
            f"{shorten(repr(first.truth))}",
            file=sys.stderr,
        )


def drop_long_prompts(prompts: PromptSplit, tokenizer: PromptTokenizer, limit: int) -> PromptSplit:
    """Return the prompts that are shorter than `limit`, rollout.max_model_len, and print how many
    are left out.

    Args:
        prompts: the prompts to train on and held out.
        tokenizer: how questions become tokens.
        limit: tokens of a prompt with its response.

    Raises:
        UserError: no prompt is left to train on."""
    train, heldout = (
        [
            prompt
            for prompt in side
            if tokenizer.fits(prompt.question, limit, prompt.messages_before)
        ]
        for side in (prompts.train, prompts.heldout)
    )
    left_out = len(prompts.train) - len(train), len(prompts.heldout) - len(heldout)
    if any(left_out):
        note = (
            f"{left_out[0]:,} questions and {left_out[1]:,} held-out ones are longer than the "
            f"{limit:,} tokens that an engine takes, and left out; rollout.max_model_len, or the "
            "model's own limit, sets that"
        )
        if not train:
            raise UserError(
                f"no question is left to train on: {note}",
                key="data.path",
                cause=Cause.TOO_LARGE,
            )
        print(note, file=sys.stderr)
    return replace(prompts, train=train, heldout=heldout)


def _describe_rows(prompts: PromptSplit, tokenizer: PromptTokenizer) -> list[str]:
    """Return what became of the rows of files, and one question as the policy gets it."""
    if not prompts.reports:
        return []
    num_train, num_heldout = len(prompts.train), len(prompts.heldout)
    lines = [line for report in prompts.reports for line in report.lines()]
    example = prompts.train[0]
    ids = tokenizer.encode(example.question, example.messages_before)
    prompt_text = make_printable(
        shorten_middle(tokenizer.render(example.question, example.messages_before), 600), True
    )
    lines += [
        f"  {format_count(num_train + num_heldout, 'question')}: {num_train:,} to train on, "
        f"{num_heldout:,} held out",
        f"  the first, {example.location}, as its {len(ids):,} tokens ({_shorten_ids(ids)}):",
        *(f"  | {line}" for line in prompt_text.split("\n")),
        f"  truth: {make_printable(shorten(repr(example.truth), 200))} (reward {example.kind})",
    ]
    if any(m["role"] == "system" for m in example.messages_before) and not tokenizer.shows_system:
        lines.append(
            "  the template has no place for the system's message: it stands before the question"
        )
    return lines


def _shorten_ids(ids: Sequence[int]) -> str:
    """Return the first and the last token ids."""
    if len(ids) <= 2 * MAX_SHOWN_IDS:
        return " ".join(map(str, ids))
    parts = ids[:MAX_SHOWN_IDS], ids[-MAX_SHOWN_IDS:]
    return " … ".join(" ".join(map(str, part)) for part in parts)


@contextlib.contextmanager
def explain_renamed_columns(columns: Mapping[str, str] | None) -> Iterator[None]:
    """If a reward lacks a field that `data.columns` has renamed, add the new name to the error.

    Raises:
        UserError: a reward lacks a field that was renamed.
    """
    try:
        yield
    except RewardUnusable as error:
        for name, source_column in (columns or {}).items():
            if source_column in error.missing and name != source_column:
                raise UserError(
                    f"{error}; the file's column {source_column!r} is read as {name} "
                    f"(data.columns), which a reward gets by that name: call its parameter {name}",
                    key=f"data.columns.{name}",
                    cause=Cause.CONFLICT,
                ) from None
        raise
