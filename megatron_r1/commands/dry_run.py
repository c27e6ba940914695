"""One batch of a run, sampled and graded by an engine of this host: responses, costs and advice
(`rl RECIPE.yaml --dry-run`)."""

import asyncio
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from r1_grading import RewardPool
from r1_grading.base.errors import shorten
from r1_grading.terms import ACCURACY, weights_at

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.commands.rl_prompts import explain_renamed_columns
from megatron_r1.commands.rollout_services import open_player
from megatron_r1.commands.run_costs import describe_run_memory, kept_files_lines
from megatron_r1.commands.run_facts import describe_stop_tokens
from megatron_r1.config import Config
from megatron_r1.config.optimizer import warmup_note
from megatron_r1.controller.advice import find_advice
from megatron_r1.controller.rollouts.collector import RolloutCollector
from megatron_r1.controller.rollouts.metrics import rollout_metrics
from megatron_r1.controller.rollouts.response_grader import check_grades
from megatron_r1.controller.rollouts.rollout import Group, Rollout, RolloutSampling, all_responses
from megatron_r1.data.prompt import Prompt
from megatron_r1.data.prompt_split import PromptSplit
from megatron_r1.data.prompt_tokenizer import PromptTokenizer
from megatron_r1.data.sampler import PromptSampler
from megatron_r1.engines.episodes import Episode
from megatron_r1.engines.fleet.engine_fleet import EngineFleet
from megatron_r1.engines.server import gpu
from megatron_r1.engines.server.model_config import max_model_len
from megatron_r1.engines.server.recipe_settings import engine_settings, fleet_settings
from megatron_r1.engines.server.server import temporary_logs
from megatron_r1.reporting import formatting
from megatron_r1.reporting.formatting import (
    format_count,
    format_duration,
    format_percent,
    make_printable,
)

MAX_RESPONSES = 64
"""The most responses that are sampled and graded: a choice."""
NUM_SHOWN_SAMPLES = 10
"""Responses that are printed."""
MAX_SHOWN_CHARS = 600
MAX_TRUTH_CHARS = 80


def show_batch(config: Config, tokenizer: PromptTokenizer, prompts: PromptSplit) -> None:
    """Sample and grade the first questions of the first rollout, at most `MAX_RESPONSES` responses
    on an engine of this host, and print responses, figures and advice. Writes nothing.

    Args:
        config: the recipe.
        tokenizer: how questions become tokens.
        prompts: the prompts to train on and held out.

    Raises:
        UserError: the recipe's engines are on other hosts, or the run would not fit into memory."""
    if config.rollout.placement != "local":
        raise UserError(
            f"--dry-run: rollout.placement: {config.rollout.placement} has its engines on other "
            "hosts; give --rollout.placement local --rollout.engines 1 for it, on a host with room",
            key="rollout.placement",
            cause=Cause.CONFLICT,
        )
    memory = describe_run_memory(config)
    first_config = config.at(1)
    group_size = min(first_config.rl.group_size, MAX_RESPONSES)
    num_groups = min(first_config.rl.prompts_per_rollout, MAX_RESPONSES // group_size)
    prompt_sampler = PromptSampler(prompts.train, config.run.seed)
    first_prompts = prompt_sampler.next_by_kind(num_groups, weights=first_config.rl.kind_weights)
    with temporary_logs() as logs:
        rollout, seconds = asyncio.run(
            _sample_rollout(first_config, tokenizer, first_prompts, group_size, logs)
        )
    groups = rollout.groups
    pairs = [(group, index) for index in range(len(groups[0].responses)) for group in groups]
    for group, index in pairs[:NUM_SHOWN_SAMPLES]:
        print(_sample_text(group, index, weights_at(first_config.rewards.weights, 1)))
    check_grades(groups, config.rewards.max_ungraded)
    print(_summarize_batch(config, first_config, rollout, seconds, memory))


async def _sample_rollout(
    config: Config, tokenizer: PromptTokenizer, prompts: list[Prompt], group_size: int, logs: Path
) -> tuple[Rollout, float]:
    """Return the rollout, and the seconds from its start to the last grade.

    Args:
        config: the recipe.
        tokenizer: the tokenizer of the prompts.
        prompts: the questions.
        group_size: responses to each question.
        logs: the folder of the engines' logs."""
    rewards, rollout = config.rewards, config.rollout
    pool = RewardPool(rewards.workers, rewards.timeout_seconds, rewards.memory_bytes)
    fleet = EngineFleet(
        rollout.engines,
        logs,
        device=gpu.engine_device(),
        max_model_len=max_model_len(config),
        seed=config.run.seed,
        **fleet_settings(rollout),
        **engine_settings(rollout),
    )
    collector = RolloutCollector(
        fleet, pool, tokenizer, rewards, player=open_player(config, tokenizer)
    )
    weights = weights_at(rewards.weights, 1)
    sampling = RolloutSampling(
        group_size,
        rollout.temperature,
        rollout.top_p,
        rollout.max_response_tokens,
        reward_weights=weights,
        stop=tuple(rollout.stop),
        top_k=rollout.top_k,
        min_p=rollout.min_p,
    )
    try:
        with explain_renamed_columns(config.data.columns):
            await collector.check(weights, prompts)
        print(describe_stop_tokens(config, tokenizer), flush=True)
        print(
            f"starting {format_count(rollout.engines, 'engine')} on {config.model.path}", flush=True
        )
        await fleet.start(config.model.path)
        print(
            f"sampling {format_count(group_size * len(prompts), 'response')} of at most "
            f"{rollout.max_response_tokens:,} tokens",
            flush=True,
        )
        start = time.perf_counter()
        batch = await collector.collect(prompts, sampling)
        seconds = time.perf_counter() - start
        return batch, seconds
    finally:
        await asyncio.gather(fleet.close(), pool.close(), collector.close())


def _sample_text(group: Group, index: int, weights: Mapping[str, float]) -> str:
    graded_response, question = group.responses[index], group.prompt.question
    response = formatting.shorten_middle(graded_response.text.strip(), MAX_SHOWN_CHARS)
    if graded_response.episode is not None:
        question, response = _format_conversation(graded_response.episode)
    term_names = {ACCURACY, *weights}
    terms = ", ".join(
        f"{t} {reward:.3g}" for t, reward in graded_response.rewards.items() if t in term_names
    )
    tokens = format_count(len(graded_response.response.token_ids), "token")
    truth = group.prompt.truth
    # Quoted: spaces at its ends would make a reward of one's own call right answers wrong.
    truth_text = "" if truth is None else f"truth {make_printable(_with_both_ends(repr(truth)))}; "
    return "\n".join(
        [
            f"--- {make_printable(shorten(question, 200))}",
            make_printable(response, keep_newlines=True),
            f"    {truth_text}{tokens}{', cut off' if graded_response.is_truncated else ''}; "
            f"{terms}; {make_printable(graded_response.reason)}",
        ]
    )


def _with_both_ends(text: str) -> str:
    """Return a text of at most `MAX_TRUTH_CHARS`, whose end a whole solution's answer is at."""
    half = MAX_TRUTH_CHARS // 2
    return text if len(text) <= MAX_TRUTH_CHARS else f"{text[:half]} … {text[-half:]}"


def _format_conversation(episode: Episode) -> tuple[str, str]:
    """Return the text that an episode began with, and its further turns: answers, and after an
    arrow what its calls returned."""
    turns = episode.turns
    first_trained = next((index for index, turn in enumerate(turns) if turn.trained), len(turns))
    questions = [turn.text for turn in turns[:first_trained] if turn.role == "user"]
    lines = []
    for turn in turns[first_trained:]:
        arrow = {"assistant": "", "tool": "-> "}.get(turn.role, f"{turn.role}: ")
        lines.append(arrow + formatting.shorten_middle(turn.text.strip(), MAX_SHOWN_CHARS))
    counts = f"({format_count(episode.num_tool_calls, 'call')}, {episode.num_tool_errors} failed)"
    return " ".join(questions[-1:]), "\n".join([*lines, counts])


def _describe_episodes(rollout: Rollout) -> list[str]:
    """Return a line with the ends of the episodes and their calls, if there are episodes."""
    episodes = [r.episode for r in all_responses(rollout.groups) if r.episode is not None]
    if not episodes:
        return []
    ends = Counter(episode.status for episode in episodes).most_common()
    calls = sum(episode.num_tool_calls for episode in episodes)
    errors = sum(episode.num_tool_errors for episode in episodes)
    counts = ", ".join(f"{count} {status}" for status, count in ends)
    return [f"episodes: {counts}; {format_count(calls, 'call')}, {errors:,} failed"]


def _summarize_batch(
    config: Config, first_config: Config, rollout: Rollout, seconds: float, memory: str
) -> str:
    """Return the batch in numbers, what the run will take at least, and what should be changed.

    Args:
        config: the recipe.
        first_config: the recipe as it is at the first step.
        rollout: the batch.
        seconds: how long it took to sample and grade.
        memory: the memory that the run takes, as text."""
    means = rollout_metrics(rollout, policy_version=0)
    responses = sum(len(group.responses) for group in rollout.groups)
    rate = means["response_tokens"] / seconds
    step_responses = first_config.rl.prompts_per_rollout * first_config.rl.group_size
    sampling_seconds = step_responses * means["response_length/mean"] / rate * config.run.steps
    lines = [
        "---",
        f"{format_count(responses, 'response')} to "
        f"{format_count(len(rollout.groups), 'question')}: accuracy "
        f"{format_percent(means['accuracy'])}, reward {means['reward/mean']:.3g}, groups with "
        "different "
        f"rewards {format_percent(1 - means['groups/zero_variance'])}",
        *_describe_episodes(rollout),
        f"{means['response_length/mean']:,.0f} tokens on average, "
        f"{format_percent(means['truncated'])} "
        f"cut off at {first_config.rollout.max_response_tokens:,}; {rate:,.0f} tokens/s",
        f"{format_count(config.run.steps, 'step')} of {step_responses:,} responses: "
        f"{format_duration(sampling_seconds)} of "
        "sampling at this rate and length, less where more is sampled at once; no total: updates, "
        "evaluations and checkpoints come on top, and the run shows the time left from its first "
        "step on",
        memory,
        *kept_files_lines(config, rollout, step_responses / responses),
        *find_advice(rollout, first_config).values(),
        *filter(None, [warmup_note(config.optimizer, config.num_policy_updates)]),
        "nothing was trained or written",
    ]
    return "\n".join(lines)
