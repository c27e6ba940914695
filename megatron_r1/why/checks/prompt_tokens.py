"""Compares the tokens of a step's prompts with those of its template and tokenizer."""

from collections.abc import Iterator, Sequence

from megatron_r1.config import Config
from megatron_r1.controller.rollouts.rollout import Group
from megatron_r1.data.prompt_tokenizer import PromptTokenizer
from megatron_r1.why.comparison import (
    Comparison,
    ResponseIndex,
    fraction_comparison,
    not_checked,
)
from megatron_r1.why.record.recorded_step import RecordedStep

FAMILY = "files"
MAX_SHOWN_CHARACTERS = 40
"""The most characters of a text that a comparison shows."""


def compare_prompts(step: RecordedStep) -> list[Comparison]:
    """Return the comparisons of a step's prompts."""
    return [_compare_starts(step), _compare_system_message(step), _compare_prompt_tokens(step)]


def _compare_starts(step: RecordedStep) -> Comparison:
    """Check for a special token that begins a prompt twice."""
    special = special_tokens(step.tokenizer)
    departing_responses = [
        index
        for number, group in enumerate(step.groups)
        if len(group.prompt_ids) > 1
        and group.prompt_ids[0] == group.prompt_ids[1]
        and group.prompt_ids[0] in special
        for index in _response_indices(number, group)
    ]
    first = step.groups[departing_responses[0][0]].prompt_ids[0] if departing_responses else 0
    return fraction_comparison(
        FAMILY,
        "start of the prompt",
        "the first two tokens of every prompt",
        departing_responses,
        len(step.responses),
        reason=f"prompts begin with {describe_token(step.tokenizer, first)} twice",
        remedy="data.template: leave the token out, the tokenizer puts it in front",
        loss_fraction=step.loss_fraction,
    )


def _compare_system_message(step: RecordedStep) -> Comparison:
    """Check that the text of a system's message is in the prompt."""
    name = "system message"
    departing_responses: list[ResponseIndex] = []
    total, missing_text = 0, ""
    for number, group in enumerate(step.groups):
        system_texts = [
            str(m["content"]) for m in group.prompt.messages_before if m.get("role") == "system"
        ]
        if not system_texts:
            continue
        total += len(group.responses)
        prompt = step.tokenizer.hf_tokenizer.decode(group.prompt_ids, skip_special_tokens=False)
        if missing_texts := [text for text in system_texts if text.strip() not in prompt]:
            departing_responses += _response_indices(number, group)
            missing_text = missing_text or missing_texts[0]
    if not total:
        return not_checked(FAMILY, name, "no question has one")
    return fraction_comparison(
        FAMILY,
        name,
        f"the prompts of {total:,} responses whose question has one",
        departing_responses,
        total,
        reason=f"the prompt lacks {missing_text[:MAX_SHOWN_CHARACTERS]!r}",
        remedy="data.template: give it {system}, or chat with a template that shows it",
        loss_fraction=step.loss_fraction,
    )


def _compare_prompt_tokens(step: RecordedStep) -> Comparison:
    name = "tokens of the prompt"
    if _has_own_prompts(step.run_config):
        return not_checked(FAMILY, name, "agents.environment or harness makes the prompts")
    if step.missing_prompts_reason:  # samples.jsonl has no message before the question
        return not_checked(FAMILY, name, step.missing_prompts_reason)
    departing_responses: list[ResponseIndex] = []
    total, reason = 0, ""
    for number, group in enumerate(step.groups):
        if not group.prompt.question:
            continue
        total += len(group.responses)
        expected_ids = step.tokenizer.encode(group.prompt.question, group.prompt.messages_before)
        if expected_ids != group.prompt_ids:
            departing_responses += _response_indices(number, group)
            reason = reason or _describe_difference(step.tokenizer, group.prompt_ids, expected_ids)
    if not total:
        return not_checked(FAMILY, name, "no question is known")
    return fraction_comparison(
        FAMILY,
        name,
        f"the prompts of {total:,} responses with data.template and the tokenizer of {step.model}",
        departing_responses,
        total,
        reason=reason,
        remedy="data.template, or the tokenizer's files: they are not what the run sampled with",
        loss_fraction=step.loss_fraction,
    )


def _describe_difference(
    tokenizer: PromptTokenizer, logged_ids: Sequence[int], expected_ids: Sequence[int]
) -> str:
    """Return in words where two prompts part."""
    shared_length = min(len(logged_ids), len(expected_ids))
    position = next(
        (i for i in range(shared_length) if logged_ids[i] != expected_ids[i]), shared_length
    )
    if list(logged_ids[1:]) == list(expected_ids):
        first = describe_token(tokenizer, logged_ids[0])
        return f"prompts have {first} in front, the tokenizer puts none there"
    if list(expected_ids[1:]) == list(logged_ids):
        first = describe_token(tokenizer, expected_ids[0])
        return f"prompts lack {first} in front, which the tokenizer puts there"
    parts = (
        tokenizer.hf_tokenizer.decode(list(ids[position : position + 12]))
        for ids in (logged_ids, expected_ids)
    )
    sampled_text, expected_text = (repr(part[:MAX_SHOWN_CHARACTERS]) for part in parts)
    return (
        f"from token {position} on {sampled_text} was sampled from, "
        f"{expected_text} is what the settings say"
    )


def _response_indices(number: int, group: Group) -> Iterator[ResponseIndex]:
    return ((number, index) for index in range(len(group.responses)))


def _has_own_prompts(config: Config) -> bool:
    """Whether a question's tokens are an environment's or an agent's affair."""
    return bool(config.agents.player_settings)


def special_tokens(tokenizer: PromptTokenizer) -> set[int]:
    """Return the numbers of a tokenizer's special tokens, with those that were added to it."""
    added = tokenizer.hf_tokenizer.added_tokens_decoder.items()
    return {
        *tokenizer.hf_tokenizer.all_special_ids,
        *(token for token, added_token in added if added_token.special),
    }


def describe_token(tokenizer: PromptTokenizer, number: int) -> str:
    """Return a token's text with its number."""
    return f"{tokenizer.hf_tokenizer.convert_ids_to_tokens(int(number))} (token {number})"
