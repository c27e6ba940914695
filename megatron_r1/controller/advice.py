"""Advice on a rollout that teaches little: a sentence for each reason, with the setting to
change."""

from collections import Counter
from collections.abc import Sequence

from r1_grading.reading import ANSWER, BOXES
from r1_grading.rewards import GRADERS, SERVED_REWARDS
from r1_grading.terms import ACCURACY

from megatron_r1.config import Config
from megatron_r1.controller.rollouts.rollout import GradedResponse, Group, Rollout, all_responses
from megatron_r1.reporting.formatting import format_count

FIRST_STEPS = 5
"""Steps that are examined: later, equal rewards and long responses may be what was learned."""
FEW_CORRECT = 0.05
MAX_EQUAL = 0.8
MAX_TRUNCATED = 0.4
MIN_LANGUAGE = 0.5


def find_advice(rollout: Rollout, config: Config) -> dict[str, str]:
    """Return topic → sentence for each fault of a rollout.

    Args:
        rollout: the groups of a step.
        config: the settings of the step."""
    groups = rollout.groups + rollout.filtered_groups
    responses = all_responses(groups)
    accuracy_advice = _accuracy_advice(groups, config)
    few_correct = bool(accuracy_advice)
    sentences = {
        "accuracy": accuracy_advice,
        # Where hardly any is right, equal rewards follow from it, and more samples do not help.
        "groups": "" if few_correct else _equal_groups(groups, config),
        "length": _cut_off(responses, few_correct, config),
        "prompt": _doubled_start(groups),
        "language": _mixed_languages(responses),
    }
    return {topic: sentence for topic, sentence in sentences.items() if sentence}


def _accuracy_advice(groups: list[Group], config: Config) -> str:
    """Advise where no graded response is right, or so few that most groups have equal rewards."""
    responses = all_responses(groups)
    graded_responses = [
        response for response in responses if ACCURACY not in response.ungraded_terms
    ]
    num_correct = sum(response.rewards.get(ACCURACY, 1.0) > 0 for response in graded_responses)
    num_equal = sum(group.has_equal_rewards for group in groups)
    is_rare = num_correct <= FEW_CORRECT * len(graded_responses) and num_equal >= MAX_EQUAL * len(
        groups
    )
    if not graded_responses or (num_correct and not is_rare):
        return ""
    sentence = f"{num_correct} of {format_count(len(graded_responses), 'response')} are right"
    # Environments and rewards of the user's own read responses as they like.
    built_in_groups = [group for group in groups if group.prompt.kind in GRADERS | SERVED_REWARDS]
    num_plain = sum(
        not any(form in response.text for form in (ANSWER, *BOXES))
        for response in all_responses(built_in_groups)
        if response.episode is None and ACCURACY not in response.ungraded_terms
    )
    if config.rewards.reading not in ("last", "auto") and 2 * num_plain > len(graded_responses):
        return (
            f"{sentence}; {num_plain:,} have neither {ANSWER} nor a box, and rewards.reading: "
            f"{config.rewards.reading} reads little else: set rewards.reading: auto, or show the "
            "form by a solved question before {question} in data.template, or teach it with "
            "`megatron-r1 sft`"
        )
    # The terms' reasons are joined in the order of the terms.
    reasons = [
        response.reason.split("; ")[0]
        for response in graded_responses
        if next(iter(response.rewards)) == ACCURACY
    ]
    if reasons:
        (common_reason, count), *_ = Counter(
            reason.split(":")[0] for reason in reasons
        ).most_common(1)
        sentence += f"; the most frequent reason, of {count:,}: {common_reason}"
    examples = "Put one or two solved questions before {question} in data.template"
    if any(
        response.episode for response in graded_responses
    ):  # its conversation begins with agents.system
        examples = "Show one or two solved questions in agents.system"
    return (
        f"{sentence}. {examples}, as turns of the model's own chat format if it has one "
        "(docs/init.md, worked examples); or check that data.template is what the model was "
        "trained with, choose easier questions, or begin with `megatron-r1 sft`"
    )


def _equal_groups(groups: Sequence[Group], config: Config) -> str:
    num_equal = sum(group.has_equal_rewards for group in groups)
    if config.rl.group_size < 2 or num_equal < MAX_EQUAL * len(groups):
        return ""
    return (
        f"{num_equal:,} of {format_count(len(groups), 'group')} have the same reward for all "
        "responses, "
        f"which teaches nothing: raise rl.group_size={config.rl.group_size} or "
        f"rollout.temperature={config.rollout.temperature:g}, or choose questions that this model "
        "answers sometimes"
    )


def _cut_off(responses: Sequence[GradedResponse], few_correct: bool, config: Config) -> str:
    num_cut = sum(response.is_truncated for response in responses)
    if num_cut < MAX_TRUNCATED * len(responses):
        return ""
    limit = config.rollout.max_response_tokens
    sentence = (
        f"{num_cut:,} of {format_count(len(responses), 'response')} are cut off at "
        f"rollout.max_response_tokens={limit}{'' if few_correct else ': raise it'}"
    )
    other_causes = (
        "the model may have learned another end token than its tokenizer's, or another template "
        f"than data.template={config.data.template[:20]!r}"
    )
    if num_cut == len(responses):
        return f"{sentence}. None has an end: {other_causes}"
    if few_correct:
        sentence += (
            ", and hardly any response is right: the model may not finish. A solved "
            f"question in data.template shows it where to stop; else {other_causes}"
        )
    return sentence


def _doubled_start(groups: Sequence[Group]) -> str:
    starts = {tuple(group.prompt_ids[:2]) for group in groups}
    if len(starts) != 1 or len(set(start := starts.pop())) != 1 or len(start) < 2:
        return ""
    return (
        f"All prompts begin with token {start[0]} twice: the tokenizer puts it in front, and "
        "data.template has it too; leave it out of the template"
    )


def _mixed_languages(responses: Sequence[GradedResponse]) -> str:
    fractions = [
        response.rewards["language"] for response in responses if "language" in response.rewards
    ]
    if not fractions or (mean := sum(fractions) / len(fractions)) >= MIN_LANGUAGE:
        return ""
    return (
        f"{mean:.0%} of the words of the thoughts are in the target language, "
        "rewards.options.language: raise rewards.weights.language, or begin with `megatron-r1 sft`"
    )
