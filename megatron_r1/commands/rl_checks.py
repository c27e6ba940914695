"""What an RL run checks before anything starts."""

import contextlib
import math
from collections.abc import Iterator, Mapping

from r1_grading.terms import RewardUnusable

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.commands import torchrun
from megatron_r1.commands.gpu_placement import check_gpu_memory
from megatron_r1.commands.rl_questions import load_questions
from megatron_r1.commands.training_run import check_trainer
from megatron_r1.config import Config
from megatron_r1.controller import algorithms
from megatron_r1.controller.teacher import check_teacher
from megatron_r1.data.end_tokens import describe
from megatron_r1.data.prompts import PromptSplit
from megatron_r1.data.text import PromptText
from megatron_r1.engines.fleet.placement import check_room, hosts_address
from megatron_r1.engines.server import gpu
from megatron_r1.engines.server.cpu_kernels import check_cpu_kernels
from megatron_r1.engines.server.limits import check_engines
from megatron_r1.models import read_hf_config
from megatron_r1.models.routing_shape import routing_shape
from megatron_r1.models.supported import check_divisions
from megatron_r1.push.plan.recipe import check_pushes


def prepare(config: Config) -> tuple[PromptText, PromptSplit]:
    """Check all that can be checked before anything starts; return the tokenizer with its template,
    and the questions. Raises UserError."""
    # In the order of what a check needs: settings, then the tokenizer, which the environment's
    # check renders with, then the questions, whose lengths the tokenizer measures. So a mistake in
    # a setting is reported without reading the data, which may be large.
    check_settings(config)
    return read_questions(config)


def read_questions(config: Config) -> tuple[PromptText, PromptSplit]:
    """Return what `prepare` does, of settings that have been checked. Raises UserError."""
    ids = config.rollout.stop_token_ids
    text = PromptText(config.model.path, config.data.template, stop_token_ids=ids)
    if config.agents.players:
        from megatron_r1.controller.rollouts.environments import check_environment

        check_environment(config, text)
    return text, load_questions(config, text)


def ends_with(config: Config, text: PromptText) -> str:
    """Return a line on what ends a response: the model's tokens, and the recipe's."""
    rollout, own = config.rollout, {end.id for end in text.end_tokens}
    more = [f"token {token}" for token in rollout.stop_token_ids if token not in own]
    more += map(repr, rollout.stop)
    given = f"; rollout.stop: {', '.join(more)}" if more else ""
    return f"responses end with {describe(text.end_tokens)}{given}"


def check_settings(config: Config) -> None:
    """Check the recipe's settings against each other, the model's config.json and this host. Raises
    UserError."""
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
    check_cpu_kernels(config.rollout, hf)
    check_room(config.rollout)
    check_pushes(config, hf, torchrun.num_ranks(config))
    transport = config.push.transport
    if transport in ("cuda_ipc", "nccl") and not gpu.is_usable():
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
    """Raise UserError for samples of a part of the vocabulary: the engine's log-probabilities are
    normalized over the tokens that the cut leaves, the trainer's over all."""
    for step, phase in config.phases():
        if phase.rollout.top_p < 1:
            when = f"rl.schedule, from_step {step}: " if step > 1 else ""
            raise UserError(
                f"{when}rollout.top_p: {phase.rollout.top_p:g} draws from a part of the "
                "vocabulary, and the trainer's log-probabilities are over all of it: each ratio "
                "would be wrong by the share that is cut off, up to "
                f"{-math.log(phase.rollout.top_p):.2g} in logprob_diff/mean. Set 1; "
                "rollout.temperature below 1 sharpens samples, and the trainer divides by it too. "
                "Evaluations have eval.top_p",
                key="rollout.top_p",
                cause=Cause.CONFLICT,
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
                    f"which a reward gets by that name: call its parameter {ours}",
                    key=f"data.columns.{ours}",
                    cause=Cause.CONFLICT,
                ) from None
        raise
