"""Facts of an RL run that are printed before it starts: its model, its questions by kind and by
teacher, and what ends a response."""

from collections import Counter

from megatron_r1.base.errors import UserError
from megatron_r1.config import Config
from megatron_r1.config.teacher import OTHER_SOURCES
from megatron_r1.controller.rollouts.teacher_fleets import count_sources
from megatron_r1.data.end_tokens import describe_end_tokens
from megatron_r1.data.prompt import Prompt
from megatron_r1.data.prompt_split import PromptSplit
from megatron_r1.data.prompt_tokenizer import PromptTokenizer
from megatron_r1.data.sampler import drawn_fractions
from megatron_r1.reporting.formatting import format_percent


def run_facts(config: Config, tokenizer: PromptTokenizer, prompts: PromptSplit) -> list[str]:
    """Return lines about the run for its title.

    Args:
        config: the recipe.
        tokenizer: how questions become tokens.
        prompts: the prompts to train on and held out.

    Raises:
        UserError: `rl.kind_weights` has a kind that no prompt has, or draws nothing, or a teacher
            has no question."""
    return [
        config.model.path,
        config.data.task or str(config.data.path),
        f"{len(prompts.train):,} questions, {len(prompts.heldout):,} held out",
        *describe_kind_weights(config, prompts.train),
        *describe_teachers(config, prompts.train),
        describe_stop_tokens(config, tokenizer),
    ]


def describe_kind_weights(config: Config, prompts: list[Prompt]) -> list[str]:
    """Return a line about each part of the run that draws kinds of questions by weight.

    Raises:
        UserError: a weight is of a kind that no prompt has, or nothing would be drawn.
    """
    lines = []
    counts = Counter(prompt.kind for prompt in prompts)
    for step, part in config.schedule_parts():
        try:
            fractions = drawn_fractions(prompts, part.rl.kind_weights)
        except UserError as error:
            raise UserError(
                f"{error}, from step {step}", key=error.key, cause=error.cause
            ) from None
        sizes = {kind: fractions[kind] * count for kind, count in counts.most_common()}
        shares = (
            f"{format_percent(size / sum(sizes.values()))} {kind}" for kind, size in sizes.items()
        )
        lines.append(f"from step {step}: {', '.join(shares)}")
    by_weight = any(part.rl.kind_weights for _, part in config.schedule_parts())
    return lines if by_weight else []


def describe_teachers(config: Config, prompts: list[Prompt]) -> list[str]:
    """Return a line with the number of questions of each of several teachers.

    Raises:
        UserError: a teacher has no question.
    """
    if not config.teacher.by_source:
        return []
    counts = count_sources(config.teacher, prompts)
    parts = (f"{count:,} of {source or OTHER_SOURCES}" for source, count in counts.items())
    return [f"teachers: {', '.join(parts)}"]


def describe_stop_tokens(config: Config, tokenizer: PromptTokenizer) -> str:
    """Return a line on what ends a response: the model's tokens, and the recipe's."""
    rollout, end_ids = config.rollout, {token.id for token in tokenizer.end_tokens}
    stops = [f"token {token}" for token in rollout.stop_token_ids if token not in end_ids]
    stops += map(repr, rollout.stop)
    line = f"responses end with {describe_end_tokens(tokenizer.end_tokens)}"
    return f"{line}; rollout.stop: {', '.join(stops)}" if stops else line
