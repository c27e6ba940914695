"""What an RL run checks before anything starts: its settings, the GPUs of this host, and the
prompts that it may draw: loaded, cut to those that fit, and reported on.

Trainer ranks take the first GPUs, engines that run on the controller's host equal shares of all
(`engines.server.gpu`): both are on the same GPUs. `commands.first_recipe.guess_layout` decides the
placement that `init` writes, and that a recipe without one is refused with."""

import contextlib
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import psutil
from r1_grading.base.errors import shorten
from r1_grading.rewards import REGISTRY, REMOTE
from r1_grading.terms import RewardUnusable

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.base.transports import TRANSPORTS
from megatron_r1.commands import torchrun
from megatron_r1.commands.first_recipe import Machine, guess_layout, value_text
from megatron_r1.commands.training_run import check_trainer
from megatron_r1.config import Config
from megatron_r1.controller import algorithms
from megatron_r1.controller.teacher import check_teacher
from megatron_r1.data.prompt_tokenizer import PromptTokenizer
from megatron_r1.data.prompts import Prompt, PromptSplit, load_prompts
from megatron_r1.data.sampler import drawn_fractions
from megatron_r1.data.tokenizer import describe_end_tokens
from megatron_r1.engines.fleet.placement import check_room, hosts_address
from megatron_r1.engines.server import gpu
from megatron_r1.engines.server.recipe_checks import (
    check_cpu_kernels,
    check_engines,
    check_local_experts,
)
from megatron_r1.engines.server.settings import max_model_len
from megatron_r1.engines.server.vllm_arguments import check_arguments
from megatron_r1.models import read_hf_config
from megatron_r1.models.experts import routing_shape
from megatron_r1.models.support_checks import check_divisions
from megatron_r1.models.weights import num_parameters
from megatron_r1.push.plan.recipe_plan import check_pushes
from megatron_r1.reporting.wording import format_count, format_percent, printable, shorten_middle

VLLM_FRACTION = 0.92
"""vLLM's default of --gpu-memory-utilization (config/cache.py)."""


def detect_machine() -> Machine:
    """Return this machine: its visible GPUs and the bytes of the smallest one's memory, or without
    a GPU the host's free memory.

    Raises:
        OSError: nvidia-smi is missing.
        subprocess.CalledProcessError: nvidia-smi fails.
    """
    if not gpu.is_usable():
        return Machine(0, psutil.virtual_memory().available)
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    sizes_mib = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
    return Machine(len(gpu.visible_gpus(os.environ)), min(map(int, sizes_mib)) * 2**20)


def engines_share_gpus(config: Config) -> bool:
    """Whether the policy's engines are on GPUs of trainer ranks."""
    local = config.rollout.placement == "local"
    return gpu.is_usable() and (local or config.rollout.colocated)


def check_gpu_memory(config: Config, hf: Mapping[str, Any]) -> None:
    """Refuse engines that take vLLM's share of GPUs, nearly all, where trainer ranks are on them.

    Args:
        config: the recipe.
        hf: the model's config.json.

    Raises:
        UserError: the engines' share is not set."""
    rollout, teacher = config.rollout, config.teacher
    taken = (
        f"gpu_memory is not set, and vLLM takes {VLLM_FRACTION} of GPUs that trainer ranks are on"
    )
    if engines_share_gpus(config) and rollout.gpu_memory is None:
        raise UserError(
            f"rollout.{taken}: set {_placement(config, hf)}; megatron-r1 plan prints the largest "
            "share",
            key="rollout.gpu_memory" if rollout.colocated else "rollout.colocated",
            cause=Cause.MISSING if rollout.colocated else Cause.CONFLICT,
        )
    if teacher.path and not teacher.url and teacher.gpu_memory is None and gpu.is_usable():
        raise UserError(
            f"teacher.{taken}: set the share that these and the policy's engines leave, or "
            "teacher.url to servers on other GPUs",
            key="teacher.gpu_memory",
            cause=Cause.MISSING,
        )


def _placement(config: Config, hf: Mapping[str, Any]) -> str:
    """Return the settings that `init` writes for this model on this host, as text."""
    if config.rollout.placement == "hosts":
        return "it to the share that the trainer leaves"
    unknown = "rollout.colocated: true and rollout.gpu_memory, what the trainer leaves of a GPU"
    if torchrun.SPANS_HOSTS in os.environ:  # with GPUs of other hosts, too
        return unknown
    try:
        machine = detect_machine()
    except (OSError, subprocess.CalledProcessError):
        return unknown
    if not machine.gpus:  # the driver has some, but they have no files in /dev
        return unknown
    guesses = guess_layout(dict(hf), num_parameters(dict(hf)), machine)
    keys = ", ".join(f"{guess.key}: {value_text(guess.value)}" for guess in guesses)
    return f"{keys}, as megatron-r1 init does on this host, or rollout.placement: hosts"


MAX_SHOWN_IDS = 8
"""Token ids that are shown of either end of a prompt."""


def _load_prompts(config: Config, tokenizer: PromptTokenizer) -> PromptSplit:
    """Return the prompts of the recipe that an engine has room for, and print what is unusual about
    the data.

    Raises:
        UserError: the data cannot be read, or no prompt is left.
    """
    rows = config.data.model_dump(exclude={"template"})
    if config.agents.player_settings:
        from megatron_r1.agents.rows import load_run_prompts

        prompts = load_run_prompts(config.agents, **rows)
    else:
        prompts = load_prompts(**rows)
    if prompts.contradictions and config.data.task is None:
        kept, other = prompts.contradictions[0]
        print(
            f"{config.data.path}: {format_count(len(prompts.contradictions), 'row')} left out, "
            "whose "
            f"question has another truth before: {shorten(kept.question)!r} has "
            f"{shorten(repr(kept.truth))}, which counts, and {shorten(repr(other.truth))}",
            file=sys.stderr,
        )
    show_padded_truths(config.data.path or config.data.task or "data", prompts)
    prompts = drop_long_prompts(prompts, tokenizer, max_model_len(config))
    for line in _describe_rows(prompts, tokenizer):
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


def _describe_rows(prompts: PromptSplit, tokenizer: PromptTokenizer) -> list[str]:
    """Return what became of the rows of files, and one question as the policy gets it."""
    if not prompts.reports:
        return []
    kept = len(prompts.train), len(prompts.heldout)
    lines = [line for report in prompts.reports for line in report.lines()]
    example = prompts.train[0]
    ids = tokenizer.encode(example.question, example.messages_before)
    shown = printable(
        shorten_middle(tokenizer.render(example.question, example.messages_before), 600), True
    )
    lines += [
        f"  {format_count(sum(kept), 'question')}: {kept[0]:,} to train on, {kept[1]:,} held out",
        f"  the first, {example.location}, as its {len(ids):,} tokens ({_ids(ids)}):",
        *(f"  | {line}" for line in shown.split("\n")),
        f"  truth: {printable(shorten(repr(example.truth), 200))} (reward {example.kind})",
    ]
    if any(m["role"] == "system" for m in example.messages_before) and not tokenizer.shows_system:
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

    Args:
        source: the file or the task.
        prompts: those to train on and held out, with their truths."""
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


def describe_kind_weights(config: Config, prompts: list[Prompt]) -> list[str]:
    """Return a line about each part of the run that draws kinds of questions by weight.

    Raises:
        UserError: as `drawn_fractions`, for any part.
    """
    lines = []
    counts = Counter(prompt.kind for prompt in prompts)
    for step, phase in config.phases():
        try:
            fractions = drawn_fractions(prompts, phase.rl.kind_weights)
        except UserError as error:
            raise UserError(
                f"{error}, from step {step}", key=error.key, cause=error.cause
            ) from None
        sizes = {kind: fractions[kind] * count for kind, count in counts.most_common()}
        parts = (
            f"{format_percent(size / sum(sizes.values()))} {kind}" for kind, size in sizes.items()
        )
        lines.append(f"from step {step}: {', '.join(parts)}")
    by_weight = any(phase.rl.kind_weights for _, phase in config.phases())
    return lines if by_weight else []


def run_facts(config: Config, tokenizer: PromptTokenizer, prompts: PromptSplit) -> list[str]:
    """Return lines about the run for its title.

    Args:
        config: the recipe.
        tokenizer: how questions become tokens.
        prompts: the prompts to train on and held out.

    Raises:
        UserError: as `describe_kind_weights`."""
    return [
        config.model.path,
        config.data.task or str(config.data.path),
        f"{len(prompts.train):,} questions, {len(prompts.heldout):,} held out",
        *describe_kind_weights(config, prompts.train),
        describe_stop_tokens(config, tokenizer),
    ]


def prepare(config: Config) -> tuple[PromptTokenizer, PromptSplit]:
    """Check all that can be checked before anything starts; return the tokenizer with its template,
    and the prompts.

    Raises:
        UserError: a mistake in the recipe or its data.
    """
    # In the order of what a check needs: settings, then the tokenizer, which the environment's
    # check renders with, then the prompts, whose lengths the tokenizer measures. So a mistake in
    # a setting is reported without reading the data, which may be large.
    check_settings(config)
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


def describe_stop_tokens(config: Config, tokenizer: PromptTokenizer) -> str:
    """Return a line on what ends a response: the model's tokens, and the recipe's."""
    rollout, own = config.rollout, {end.id for end in tokenizer.end_tokens}
    more = [f"token {token}" for token in rollout.stop_token_ids if token not in own]
    more += map(repr, rollout.stop)
    given = f"; rollout.stop: {', '.join(more)}" if more else ""
    return f"responses end with {describe_end_tokens(tokenizer.end_tokens)}{given}"


def check_settings(config: Config) -> None:
    """Check the recipe's settings against each other, the model's config.json and this host.

    Raises:
        UserError: a setting that is impossible or unsupported.
    """
    if config.model.init != "load":
        raise UserError(
            "model.init: rl needs a model to start from; make one with sft, then load",
            key="model.init",
            cause=Cause.CONFLICT,
        )
    config.model.require_language_head()
    algorithms.find(config.rl.algorithm)
    check_trainer(config, "rl")
    hf = read_hf_config(config.model.path)
    if config.rl.routing_replay:
        routing_shape(hf)
    # Layers without Transformer Engine need more; whether ranks have it only they know.
    check_divisions(hf, config.parallel, transformer_engine=True)
    check_engines(config, hf)
    check_local_experts(config.rollout)
    check_cpu_kernels(config.rollout, hf)
    check_arguments(config.rollout, "rollout")
    check_room(config.rollout)
    check_pushes(config, hf, torchrun.world_size(config))
    if config.push.adapter_only and config.rollout.dtype == "float32" and gpu.is_usable():
        raise UserError(
            "push.adapter_only with rollout.dtype: float32: vLLM's LoRA kernels on GPUs compute in "
            "bfloat16 only; set rollout.dtype: bfloat16, or push.adapter_only: false",
            key="push.adapter_only",
            cause=Cause.UNSUPPORTED,
        )
    transport = config.push.transport
    if TRANSPORTS[transport].needs_gpu and not gpu.is_usable():
        raise UserError(
            f"push.transport: {transport} moves memory of GPUs, and there is none here; set shm, "
            "or gloo where engines are on other hosts",
            key="push.transport",
            cause=Cause.UNSUPPORTED,
        )
    check_teacher(config)
    check_sampling(config)
    check_gpu_memory(config, hf)
    if config.rollout.placement == "hosts":
        hosts_address(config.rollout)


def check_sampling(config: Config) -> None:
    """Raise UserError for samples of a part of the vocabulary that the trainer cannot follow: its
    softmax is over the tokens that the engine kept, whose ids come with each sampled one."""
    first, *_ = phases = config.phases()
    for step, phase in phases:
        rollout, when = phase.rollout, f"rl.schedule, from_step {step}: " if step > 1 else ""
        cut = "top_p" if rollout.top_p < 1 else "min_p" if rollout.min_p else "top_k"
        key, shown = f"rollout.{cut}", f"{when}rollout.{cut}: {getattr(rollout, cut)}"
        if rollout.truncates_sampling != first[1].rollout.truncates_sampling:
            raise UserError(
                f"{shown}: a batch may hold samples of both settings, and the trainer needs the "
                "kept tokens of all of them or of none: cut from the first step on, with "
                "rollout.top_k: the size of the vocabulary where nothing is to be left out",
                key=key,
                cause=Cause.CONFLICT,
            )
        if not rollout.truncates_sampling:
            continue
        if rollout.top_k is None:
            off = f" (by up to {-math.log(rollout.top_p):.2g} in logprob_diff/mean)"
            raise UserError(
                f"{shown} draws from a part of the vocabulary. Log-probabilities over all of it "
                f"are not those of the samples{off if rollout.top_p < 1 else ''}, so the trainer "
                "needs the tokens that the engine kept: set rollout.top_k, which bounds their "
                "number (4 bytes each); rollout.temperature below 1 sharpens samples without them. "
                "Evaluations have eval.top_p",
                key=key,
                cause=Cause.MISSING,
            )
        if rollout.min_p and rollout.speculative.method != "none":
            raise UserError(
                f"{shown}: vLLM verifies drafts without min_p; use rollout.top_p, or leave out "
                "rollout.speculative",
                key="rollout.min_p",
                cause=Cause.CONFLICT,
            )


@contextlib.contextmanager
def explain_renamed_columns(columns: Mapping[str, str] | None) -> Iterator[None]:
    """If a reward lacks a field that `data.columns` has renamed, add the new name to the error.

    Raises:
        UserError: a reward lacks a field that was renamed.
    """
    try:
        yield
    except RewardUnusable as error:
        for ours, theirs in (columns or {}).items():
            if theirs in error.missing and ours != theirs:
                raise UserError(
                    f"{error}; the file's column {theirs!r} is read as {ours} (data.columns), "
                    f"which a reward gets by that name: call its parameter {ours}",
                    key=f"data.columns.{ours}",
                    cause=Cause.CONFLICT,
                ) from None
        raise
