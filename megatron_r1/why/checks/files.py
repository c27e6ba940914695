"""The model's files and the settings, against the tokens and texts that were logged."""

from megatron_r1.why.checks.end_tokens import check_ends, single_turn_tokens
from megatron_r1.why.checks.prompt_tokens import FAMILY, MAX_SHOWN_CHARACTERS, check_prompts
from megatron_r1.why.comparison import Comparison, fraction_comparison, not_checked
from megatron_r1.why.record.recorded_step import RecordedStep


def check(step: RecordedStep) -> list[Comparison]:
    """Return the comparisons of a step's files."""
    return [
        *check_prompts(step),
        *check_ends(step),
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
