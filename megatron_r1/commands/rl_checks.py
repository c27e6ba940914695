"""What an RL run checks before anything starts, and the questions that it may draw."""

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator, Mapping

from megatron_r1.agents.rows import rows_of
from megatron_r1.commands import torchrun
from megatron_r1.commands.training_run import check_trainer
from megatron_r1.config import Config
from megatron_r1.data.prompts import Prompt, PromptSplit
from megatron_r1.data.sampler import draw_shares
from megatron_r1.data.text import PromptText
from megatron_r1.engine import gpu
from megatron_r1.engine.cpu_kernels import check_cpu_kernels
from megatron_r1.engine.limits import check_engines, context_length
from megatron_r1.errors import UserError
from megatron_r1.fleet.placement import check_room, hosts_address
from megatron_r1.models import read_hf_config
from megatron_r1.models.routing_shape import routing_shape
from megatron_r1.reporting.wording import counted, percent
from megatron_r1.rewards import REGISTRY, REMOTE
from megatron_r1.rewards.base import shorten
from megatron_r1.rewards.terms import RewardUnusable
from megatron_r1.rl import algorithms
from megatron_r1.rl.environments import check_environment
from megatron_r1.rl.teacher import check_teacher
from megatron_r1.weight_sync.plan.checks import check_pushes


def prepare(config: Config) -> tuple[PromptText, PromptSplit]:
    """Check all that can be checked before anything starts; return the tokenizer with its template,
    and the questions. Raises UserError."""
    if config.model.init != "load":
        raise UserError("model.init: rl needs a model to start from; make one with sft, then load")
    config.model.require_language_head()
    algorithms.find(config.rl.algorithm)
    check_trainer(config, "rl")
    hf = read_hf_config(config.model.path)
    if config.rl.routing_replay:
        routing_shape(hf)
    check_engines(config, hf)
    check_cpu_kernels(config.rollout, hf)
    check_room(config.rollout)
    check_pushes(config, hf, torchrun.num_ranks(config))
    transport = config.push.transport
    if transport in ("cuda_ipc", "nccl") and not gpu.is_usable():
        raise UserError(
            f"push.transport: {transport} moves memory of GPUs, and there is none here; set shm, "
            "or gloo where engines are on other hosts"
        )
    if config.rollout.colocated and config.rollout.gpu_memory is None and gpu.is_usable():
        raise UserError(
            "rollout.gpu_memory is not set, and vLLM takes 0.92 of a GPU, which rollout.colocated "
            "shares with a trainer rank; set what the rank leaves: tools/plan prints the most"
        )
    check_teacher(config)
    if config.rollout.placement == "hosts":
        hosts_address(config.rollout)
    text = PromptText(config.model.path, config.data.template)
    check_environment(config, text)
    rows = config.data.model_dump(exclude={"template"})
    prompts = rows_of(config.agents, **rows)
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
    return text, prompts


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


@contextlib.contextmanager
def naming_renamed_columns(columns: Mapping[str, str] | None) -> Iterator[None]:
    """If a reward lacks a field that `data.columns` has renamed, add the new name to the error."""
    try:
        yield
    except RewardUnusable as error:
        for ours, theirs in (columns or {}).items():
            if theirs in error.missing and ours != theirs:
                raise UserError(
                    f"{error}; the file's column {theirs!r} is read as {ours} (data.columns), "
                    f"which a reward gets by that name: call its parameter {ours}"
                ) from None
        raise


def prompts_that_fit(prompts: PromptSplit, text: PromptText, room: int) -> PromptSplit:
    """Return the prompts that an engine has room for, and print how many are left out. Raises
    UserError where none is left to train on."""
    train = [prompt for prompt in prompts.train if text.fits(prompt.question, room)]
    heldout = [prompt for prompt in prompts.heldout if text.fits(prompt.question, room)]
    left_out = len(prompts.train) - len(train), len(prompts.heldout) - len(heldout)
    if any(left_out):
        note = (
            f"{left_out[0]:,} questions and {left_out[1]:,} held-out ones are longer than the "
            f"{room:,} tokens an engine has room for, and left out; rollout.max_model_len, or the "
            "model's own limit, is that room"
        )
        if not train:
            raise UserError(f"no question is left to train on: {note}")
        print(note, file=sys.stderr)
    return PromptSplit(train, heldout)


def questions_drawn(config: Config, prompts: list[Prompt]) -> list[str]:
    """Return a line about each part of the run that draws kinds of questions by weight. Raises
    UserError as `draw_shares`, for any part."""
    lines = []
    counts = Counter(prompt.kind for prompt in prompts)
    for step, phase in config.phases():
        try:
            shares = draw_shares(prompts, phase.rl.kind_weights)
        except UserError as error:
            raise UserError(f"{error}, from step {step}") from None
        sizes = {kind: shares[kind] * count for kind, count in counts.most_common()}
        parts = (f"{percent(size / sum(sizes.values()))} {kind}" for kind, size in sizes.items())
        lines.append(f"from step {step}: {', '.join(parts)}")
    by_weight = any(phase.rl.kind_weights for _, phase in config.phases())
    return lines if by_weight else []
