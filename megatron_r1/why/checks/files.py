"""Compares the model's files and the settings with the tokens and texts that were logged, and with
the tokens that end responses."""

import math
import re
from collections import Counter

import numpy as np

from megatron_r1.data.end_tokens import describe_end_tokens
from megatron_r1.why.checks.prompt_tokens import (
    FAMILY,
    MAX_SHOWN_CHARACTERS,
    compare_prompts,
    describe_token,
    special_tokens,
)
from megatron_r1.why.comparison import (
    Comparison,
    ResponseIndex,
    fraction_comparison,
    not_checked,
)
from megatron_r1.why.record.recorded_step import RecordedStep

MIN_END_TOKEN_FRACTION = 0.5
"""A special token counts as an end token if it occurs in at least this share of the responses."""
MIN_END_TOKEN_LOGPROB = math.log(0.25)
"""The least log-probability of such a token: a random model draws special tokens too, each with
about the probability of any other token."""
TAG_WORDS = re.compile("think|answer|tool")
"""Of special tokens that stand inside a response by right."""


def compare_files(step: RecordedStep) -> list[Comparison]:
    """Return the comparisons of a step's files."""
    return [
        *compare_prompts(step),
        *compare_ends(step),
        _compare_vocabulary(step),
        _compare_texts(step),
    ]


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
    responses = single_turn_tokens(step)
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


def compare_ends(step: RecordedStep) -> list[Comparison]:
    """Return the comparisons of the ends of a step's responses."""
    return [_find_tokens_after_end(step), _find_unknown_ends(step), _find_missing_ends(step)]


def _find_tokens_after_end(step: RecordedStep) -> Comparison:
    """Check that no response goes on after a token that ends it."""
    responses, ends = single_turn_tokens(step), step.tokenizer.stop_token_ids
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
        end_token = describe_token(step.tokenizer, token)
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
    responses, ends = single_turn_tokens(step), step.tokenizer.stop_token_ids
    name, remedy = "other end tokens", "rollout.stop_token_ids: add the token"
    if not responses:
        return not_checked(FAMILY, name, "all responses have several turns")
    special = {
        token
        for token in special_tokens(step.tokenizer) - set(ends)
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
        else f"{describe_token(step.tokenizer, commonest_token)} is inside responses, or ends "
        "them, and is no end token",
        remedy=remedy,
        loss_fraction=step.loss_fraction,
        tolerance=MIN_END_TOKEN_FRACTION,
        tolerance_source="a model that ends with a token does so in most responses",
    )


def _find_missing_ends(step: RecordedStep) -> Comparison:
    """Check that what ended by itself ends with an end token or a string of rollout.stop."""
    responses, ends = single_turn_tokens(step), step.tokenizer.stop_token_ids
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


def single_turn_tokens(step: RecordedStep) -> dict[ResponseIndex, np.ndarray]:
    """Return the tokens of the responses of one turn."""
    return {
        index: np.asarray(graded.response.token_ids)
        for index, graded in step.responses.items()
        if graded.episode is None
    }
