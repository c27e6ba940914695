"""The questions that an RL run may draw: loaded, cut to those that fit, and reported on."""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from r1_grading.base.errors import shorten
from r1_grading.rewards import REGISTRY, REMOTE

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.config import Config
from megatron_r1.data.prompts import Prompt, PromptSplit, load_prompts
from megatron_r1.data.sampler import draw_shares
from megatron_r1.data.text import PromptText
from megatron_r1.engines.server.limits import context_length
from megatron_r1.reporting.wording import counted, percent, printable, shorten_middle

MAX_SHOWN_IDS = 8
"""Token ids that are shown of either end of a prompt."""


def load_questions(config: Config, text: PromptText) -> PromptSplit:
    """Return the questions of the recipe that an engine has room for, and print what is unusual
    about the data. Raises UserError for unreadable data, and where no question is left."""
    rows = config.data.model_dump(exclude={"template"})
    if config.agents.players:
        from megatron_r1.agents.rows import rows_of

        prompts = rows_of(config.agents, **rows)
    else:
        prompts = load_prompts(**rows)
    if prompts.contradictions and config.data.task is None:
        kept, other = prompts.contradictions[0]
        print(
            f"{config.data.path}: {counted(len(prompts.contradictions), 'row')} left out, whose "
            f"question has another truth before: {shorten(kept.question)!r} has "
            f"{shorten(repr(kept.truth))}, which counts, and {shorten(repr(other.truth))}",
            file=sys.stderr,
        )
    show_padded_truths(config.data.path or config.data.task or "data", prompts)
    prompts = prompts_that_fit(prompts, text, context_length(config))
    for line in describe_rows(prompts, text):
        print(line)
    per_rollout = config.rl.questions_per_rollout
    if per_rollout > len(prompts.train):
        print(
            f"rl.questions_per_rollout: {per_rollout} is more than the {len(prompts.train):,} "
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


def describe_rows(prompts: PromptSplit, text: PromptText) -> list[str]:
    """Return what became of the rows of files, and one question as the policy gets it."""
    if not prompts.reports:
        return []
    kept = len(prompts.train), len(prompts.heldout)
    lines = [line for report in prompts.reports for line in report.lines()]
    example = prompts.train[0]
    ids = text.encode(example.question, example.before)
    shown = printable(shorten_middle(text.render(example.question, example.before), 600), True)
    lines += [
        f"  {counted(sum(kept), 'question')}: {kept[0]:,} to train on, {kept[1]:,} held out",
        f"  the first, {example.location}, as its {len(ids):,} tokens ({_ids(ids)}):",
        *(f"  | {line}" for line in shown.split("\n")),
        f"  truth: {printable(shorten(repr(example.truth), 200))} (reward {example.kind})",
    ]
    if any(m["role"] == "system" for m in example.before) and not text.shows_system:
        lines.append(
            "  the template has no place for the system's message: it stands before the question"
        )
    return lines


def _ids(ids: Sequence[int]) -> str:
    """Return the first and the last token ids."""
    if len(ids) <= 2 * MAX_SHOWN_IDS:
        return " ".join(map(str, ids))
    parts = ids[:MAX_SHOWN_IDS], ids[-MAX_SHOWN_IDS:]
    return " … ".join(" ".join(map(str, part)) for part in parts)


def show_padded_truths(source: str, prompts: PromptSplit) -> None:
    """Print how many truths have spaces at an end, which a reward of the user's own may compare.
    source: the file or the task."""
    padded = [
        prompt
        for prompt in prompts.train + prompts.heldout
        if prompt.kind not in REGISTRY | REMOTE
        and isinstance(prompt.truth, str)
        and prompt.truth != prompt.truth.strip()
    ]
    if padded:
        first = padded[0]
        verb = "begins or ends" if len(padded) == 1 else "begin or end"
        print(
            f"{source}: {counted(len(padded), 'truth')} {verb} with a space, which "
            f"{first.kind} gets with it: {shorten(first.question)!r} has "
            f"{shorten(repr(first.truth))}",
            file=sys.stderr,
        )


def prompts_that_fit(prompts: PromptSplit, text: PromptText, room: int) -> PromptSplit:
    """Return the prompts that an engine has room for, and print how many are left out. Raises
    UserError where none is left to train on."""
    train, heldout = (
        [prompt for prompt in side if text.fits(prompt.question, room, prompt.before)]
        for side in (prompts.train, prompts.heldout)
    )
    left_out = len(prompts.train) - len(train), len(prompts.heldout) - len(heldout)
    if any(left_out):
        note = (
            f"{left_out[0]:,} questions and {left_out[1]:,} held-out ones are longer than the "
            f"{room:,} tokens an engine has room for, and left out; rollout.max_model_len, or the "
            "model's own limit, is that room"
        )
        if not train:
            raise UserError(
                f"no question is left to train on: {note}",
                key="data.path",
                cause=Cause.TOO_LARGE,
            )
        print(note, file=sys.stderr)
    return replace(prompts, train=train, heldout=heldout)


def questions_drawn(config: Config, prompts: list[Prompt]) -> list[str]:
    """Return a line about each part of the run that draws kinds of questions by weight. Raises
    UserError as `draw_shares`, for any part."""
    lines = []
    counts = Counter(prompt.kind for prompt in prompts)
    for step, phase in config.phases():
        try:
            shares = draw_shares(prompts, phase.rl.kind_weights)
        except UserError as error:
            raise UserError(
                f"{error}, from step {step}", key=error.key, cause=error.cause
            ) from None
        sizes = {kind: shares[kind] * count for kind, count in counts.most_common()}
        parts = (f"{percent(size / sum(sizes.values()))} {kind}" for kind, size in sizes.items())
        lines.append(f"from step {step}: {', '.join(parts)}")
    by_weight = any(phase.rl.kind_weights for _, phase in config.phases())
    return lines if by_weight else []
