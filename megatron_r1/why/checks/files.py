"""The model's files and the settings against what was logged: the prompt's tokens, the tokens that
end a response, the vocabulary, and the text that graders read."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from megatron_r1.config import Config
from megatron_r1.controller.rollouts.rollout import Group
from megatron_r1.data.prompt_tokenizer import PromptTokenizer
from megatron_r1.data.tokenizer import describe_end_tokens
from megatron_r1.why.comparison import (
    Comparison,
    ResponseIndex,
    fraction_comparison,
    not_checked,
)
from megatron_r1.why.record.recorded_step import RecordedStep

FAMILY = "files"
MIN_END_TOKEN_FRACTION = 0.5
"""The least share of the responses inside which a special token is, to be taken for one that the
model ends with."""
MIN_END_TOKEN_LOGPROB = math.log(0.25)
"""The least log-probability of such a token: a random model draws special tokens too, each with
about the probability of any other token."""
TAG_WORDS = re.compile("think|answer|tool")
"""Of special tokens that stand inside a response by right."""
MAX_SHOWN_CHARACTERS = 40
"""The most characters of a text that a comparison shows."""


def check(step: RecordedStep) -> list[Comparison]:
    """Return the comparisons of a step's files."""
    return [
        _compare_starts(step),
        _compare_system_message(step),
        _compare_prompt_tokens(step),
        _compare_ends(step),
        _find_unknown_ends(step),
        _find_missing_ends(step),
        _compare_vocabulary(step),
        _compare_texts(step),
    ]


def _special_tokens(tokenizer: PromptTokenizer) -> set[int]:
    added = tokenizer.hf_tokenizer.added_tokens_decoder.items()
    return {
        *tokenizer.hf_tokenizer.all_special_ids,
        *(token for token, added_token in added if added_token.special),
    }


def _indices(number: int, group: Group) -> Iterator[ResponseIndex]:
    return ((number, index) for index in range(len(group.responses)))


def _has_own_prompts(config: Config) -> bool:
    """Whether a question's tokens are an environment's or an agent's affair."""
    return bool(config.agents.player_settings)


def _compare_starts(step: RecordedStep) -> Comparison:
    """Check for a special token that begins a prompt twice."""
    special = _special_tokens(step.tokenizer)
    departing_responses = [
        index
        for number, group in enumerate(step.groups)
        if len(group.prompt_ids) > 1
        and group.prompt_ids[0] == group.prompt_ids[1]
        and group.prompt_ids[0] in special
        for index in _indices(number, group)
    ]
    first = step.groups[departing_responses[0][0]].prompt_ids[0] if departing_responses else 0
    return fraction_comparison(
        FAMILY,
        "start of the prompt",
        "the first two tokens of every prompt",
        departing_responses,
        len(step.responses),
        reason=f"prompts begin with {_describe_token(step.tokenizer, first)} twice",
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
            departing_responses += _indices(number, group)
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
            departing_responses += _indices(number, group)
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
        first = _describe_token(tokenizer, logged_ids[0])
        return f"prompts have {first} in front, the tokenizer puts none there"
    if list(expected_ids[1:]) == list(logged_ids):
        first = _describe_token(tokenizer, expected_ids[0])
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


def _describe_token(tokenizer: PromptTokenizer, number: int) -> str:
    return f"{tokenizer.hf_tokenizer.convert_ids_to_tokens(int(number))} (token {number})"


def _single_turn_tokens(step: RecordedStep) -> dict[ResponseIndex, np.ndarray]:
    """Return the tokens of the responses of one turn."""
    return {
        index: np.asarray(graded.response.token_ids)
        for index, graded in step.responses.items()
        if graded.episode is None
    }


def _compare_ends(step: RecordedStep) -> Comparison:
    """Check that no response goes on after a token that ends it."""
    responses, ends = _single_turn_tokens(step), step.tokenizer.stop_token_ids
    if not responses:
        return not_checked(FAMILY, "end of the response", "all responses have several turns")
    departing_responses, tokens, num_after = [], Counter[int](), 0
    for index, ids in responses.items():
        end_positions = np.flatnonzero(np.isin(ids[:-1], ends))
        if len(end_positions):
            departing_responses.append(index)
            tokens[int(ids[end_positions[0]])] += 1
            num_after += len(ids) - 1 - int(end_positions[0])
    reason = ""
    if departing_responses:
        (token, count), *_ = tokens.most_common(1)
        end_token = _describe_token(step.tokenizer, token)
        reason = f"{count:,} responses go on after {end_token}, which ends one"
        engine_ends = next(
            (settings.stop_token_ids for settings in step.sampling if settings), None
        )
        if engine_ends is not None and token not in engine_ends:
            reason += f"; the engines were told to stop at {', '.join(map(str, engine_ends))} only"
    return fraction_comparison(
        FAMILY,
        "end of the response",
        f"{len(responses):,} responses with {describe_end_tokens(step.tokenizer.end_tokens)}",
        departing_responses,
        len(responses),
        reason=reason,
        remedy="rollout.stop_token_ids, or eos_token_id in the model's generation_config.json",
        loss_fraction=step.loss_fraction,
        num_tokens=num_after,
    )


def _find_unknown_ends(step: RecordedStep) -> Comparison:
    """Check for ends that no setting names, and for special tokens that responses go on after."""
    responses, ends = _single_turn_tokens(step), step.tokenizer.stop_token_ids
    name, remedy = "other end tokens", "rollout.stop_token_ids: add the token"
    if not responses:
        return not_checked(FAMILY, name, "all responses have several turns")
    special = {
        token
        for token in _special_tokens(step.tokenizer) - set(ends)
        if not TAG_WORDS.search(step.tokenizer.hf_tokenizer.convert_ids_to_tokens(token))
    }
    responses_by_token: dict[int, list[ResponseIndex]] = {}
    for index, ids in responses.items():
        response = step.responses[index].response
        is_finished = response.finish_reason == "stop"
        count = len(ids) - (not is_finished or bool(step.config.rollout.stop))
        is_likely = np.asarray(response.logprobs[:count]) >= MIN_END_TOKEN_LOGPROB
        for token in special.intersection(ids[:count][is_likely].tolist()):
            responses_by_token.setdefault(token, []).append(index)
    commonest_token = max(
        responses_by_token, key=lambda token: len(responses_by_token[token]), default=None
    )
    departing_responses = [] if commonest_token is None else responses_by_token[commonest_token]
    return fraction_comparison(
        FAMILY,
        name,
        f"special tokens inside {len(responses):,} responses",
        departing_responses,
        len(responses),
        reason=""
        if commonest_token is None
        else f"{_describe_token(step.tokenizer, commonest_token)} is inside responses, or ends "
        "them, and is no end token",
        remedy=remedy,
        loss_fraction=step.loss_fraction,
        tolerance=MIN_END_TOKEN_FRACTION,
        source="a model that ends with a token does so in most responses",
    )


def _find_missing_ends(step: RecordedStep) -> Comparison:
    """Check that what ended by itself ends with an end token or a string of rollout.stop."""
    responses, ends = _single_turn_tokens(step), step.tokenizer.stop_token_ids
    name, limit = "end token of finished responses", step.config.rollout.max_response_tokens
    finished_responses = {
        index: ids
        for index, ids in responses.items()
        if step.responses[index].response.finish_reason == "stop"
    }
    if not finished_responses:
        return not_checked(FAMILY, name, "no response of one turn ended by itself")
    departing_responses = [
        index
        for index, ids in finished_responses.items()
        if not (len(ids) and ids[-1] in ends)
        and not any(string in step.responses[index].text for string in step.config.rollout.stop)
    ]
    end_tokens = describe_end_tokens(step.tokenizer.end_tokens)
    num_departing = len(departing_responses)
    reason = f"{num_departing:,} responses are recorded as finished and lack their end token, "
    remedy = "what changes tokens after the engine (controller/rollouts): they are trained on "
    remedy += "without the token that ends them"
    if all(
        len(finished_responses[index]) >= step.response_limit(index)
        for index in departing_responses
    ):
        reason = f"{num_departing:,} responses are as long as the limit of {limit:,} tokens, are "
        reason += "recorded as finished though they were cut off, and do not end with "
        remedy = "finish_reason of the engine's reply, or what changes it: length, not stop"
    return fraction_comparison(
        FAMILY,
        name,
        f"the last tokens of {len(finished_responses):,} responses that ended by themselves",
        departing_responses,
        len(responses),
        reason=f"{reason}{end_tokens}",
        remedy=remedy,
        loss_fraction=step.loss_fraction,
    )


def _compare_vocabulary(step: RecordedStep) -> Comparison:
    rows, num_tokens = step.hf_config["vocab_size"], len(step.tokenizer.hf_tokenizer)
    departing_responses, largest_id = [], -1
    for sequence in step.sequences:
        sequence_largest_id = int(sequence.token_ids.max(initial=-1))
        largest_id = max(largest_id, sequence_largest_id)
        if sequence_largest_id >= min(rows, num_tokens):
            departing_responses.append(sequence.response)
    return fraction_comparison(
        FAMILY,
        "vocabulary",
        f"tokens up to {largest_id:,} with {num_tokens:,} of the tokenizer "
        f"and {rows:,} rows of the model",
        list(dict.fromkeys(departing_responses)),
        len(step.responses),
        reason=f"token {largest_id:,} is beyond the tokenizer's {num_tokens:,} tokens"
        f" (vocab_size: {rows:,})",
        remedy="the model's tokenizer files, which lack tokens that the model samples, or "
        "vocab_size in its config.json",
        loss_fraction=step.loss_fraction,
    )


def _compare_texts(step: RecordedStep) -> Comparison:
    """Check that the graded text is that of the tokens."""
    responses = _single_turn_tokens(step)
    name = "text that was graded"
    if not responses or step.config.rollout.stop:
        reason = "rollout.stop cuts texts" if responses else "all responses have several turns"
        return not_checked(FAMILY, name, reason)
    departing_responses = [
        index
        for index, ids in responses.items()
        if step.tokenizer.decode(ids.tolist()) != step.responses[index].text
    ]
    example = ""
    if departing_responses:
        index = departing_responses[0]
        logged_text = step.responses[index].text[-MAX_SHOWN_CHARACTERS:]
        decoded_text = step.tokenizer.decode(responses[index].tolist())[-MAX_SHOWN_CHARACTERS:]
        example = f"graders read …{logged_text!r}, the tokens say …{decoded_text!r}"
    return fraction_comparison(
        FAMILY,
        name,
        f"{len(responses):,} texts with their tokens",
        departing_responses,
        len(responses),
        reason=example,
        remedy="the model's tokenizer files: they are not those of the run",
        loss_fraction=step.loss_fraction,
    )
