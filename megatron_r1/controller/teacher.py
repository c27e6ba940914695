"""The teacher of on-policy distillation: engines that only score the tokens which the student
sampled (`RolloutFleet.score`). Their weights never change."""

from collections.abc import Callable, Mapping
from pathlib import Path

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.config import Config
from megatron_r1.config.algorithms import find_rules
from megatron_r1.data.tokenizer import load_tokenizer
from megatron_r1.engines.fleet.external import ExternalFleet
from megatron_r1.engines.fleet.rollout_fleet import RolloutFleet
from megatron_r1.engines.server import from_recipe, gpu
from megatron_r1.engines.server.vllm_arguments import check_arguments
from megatron_r1.models.hf_config import language_settings, load_config

NUM_SHOWN = 5
"""Differing tokens that an error names."""


def teacher_fleet(config: Config, logs: Path, notify: Callable[[str], None]) -> RolloutFleet:
    """Return the engines of section `teacher`, to be started with the model `teacher.path`."""
    teacher = config.teacher
    supervision = {**from_recipe.fleet_settings(teacher), "role": "teacher", "notify": notify}
    # vLLM samples one token after those it scores. If that is beyond the model's positions it must
    # be allowed; nothing is computed there, as the token is not an input.
    max_model_len = from_recipe.context_length(config) + 1
    if teacher.url:
        return ExternalFleet(teacher.url, logs, max_model_len=max_model_len, **supervision)
    return RolloutFleet(
        teacher.engines,
        logs,
        device=gpu.device(),
        max_model_len=max_model_len,
        prefix_caching=False,  # vLLM computes the whole prompt if it scores its tokens
        extra_args=["--max-num-batched-tokens", str(teacher.tokens_at_once)],
        extra_env={"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"},
        **supervision,
        **from_recipe.engine_settings(teacher),
    )


def check_teacher(config: Config) -> None:
    """Raise UserError for a teacher that cannot score the student's responses, that the algorithm
    does not use, or that it needs and that is not set.

    A teacher needs a model folder, at least the student's context length, and the student's ids for
    all of the student's tokens. The student must sample at temperature 1 and top_p 1."""
    path, algorithm = config.teacher.path, config.rl.algorithm
    if bool(path) != find_rules(algorithm).teacher:
        raise UserError(
            f"teacher.path: {path} would not be used by rl.algorithm: {algorithm}; set that to "
            "on_policy_distillation, or leave the teacher out"
            if path
            else f"rl.algorithm: {algorithm} learns from a teacher: set teacher.path to its folder",
            key="teacher.path",
            cause=Cause.CONFLICT if path else Cause.MISSING,
        )
    if not path:
        return
    hf = load_config(path, "teacher.path")
    if not config.teacher.url:
        from_recipe.check_ranks(config.teacher, hf, "teacher")
        check_arguments(config.teacher, "teacher")
    room, needed = from_recipe.positions(path, "teacher.path"), from_recipe.context_length(config)
    if room < needed:
        raise UserError(
            f"teacher.path {path} has {room} positions (max_position_embeddings), and the student "
            f"writes up to {needed} tokens with the prompt; set rollout.max_model_len: {room}",
            key="teacher.path",
            cause=Cause.TOO_LARGE,
        )
    for step, phase in config.phases():
        rollout = phase.rollout
        if (rollout.temperature, rollout.top_p) == (1.0, 1.0):
            continue
        when = f"rl.schedule, from_step {step}: " if step > 1 else ""
        raise UserError(
            f"{when}rollout.temperature: {rollout.temperature:g}, rollout.top_p: "
            f"{rollout.top_p:g}: the teacher scores at temperature 1 without a cut, which has to "
            "be the student's distribution too; set both to 1",
            key="rollout.top_p" if rollout.temperature == 1.0 else "rollout.temperature",
            cause=Cause.CONFLICT,
        )
    student = load_config(config.model.path)
    own, known = (language_settings(each).get("vocab_size", 0) for each in (student, hf))
    if known < own:
        raise UserError(
            f"teacher.path {path} knows tokens 0 … {known - 1}, and the student may write any of "
            f"0 … {own - 1}; choose a teacher with a vocab_size of at least {own}",
            key="teacher.path",
            cause=Cause.CONFLICT,
        )
    tokenizer = load_tokenizer(config.model.path, "model.path")
    vocabulary = load_tokenizer(path, "teacher.path").get_vocab()
    if difference := differing_tokens(tokenizer.get_vocab(), vocabulary):
        raise UserError(
            f"teacher.path {path}: its tokenizer is not the student's ({config.model.path}), so "
            f"its log-probabilities are of other texts: {difference}. Choose a teacher of the same "
            "family",
            key="teacher.path",
            cause=Cause.CONFLICT,
        )


def differing_tokens(student: Mapping[str, int], teacher: Mapping[str, int]) -> str:
    """Describe the student's tokens (token → id) that have another id with the teacher; "" if none
    has."""
    by_id = {number: token for token, number in teacher.items()}
    wrong = sorted(
        (number, token) for token, number in student.items() if by_id.get(number) != token
    )
    shown = [
        f"{number} is {token!r}, to the teacher {by_id.get(number, 'nothing')!r}"
        for number, token in wrong[:NUM_SHOWN]
    ]
    more = f" and {len(wrong) - NUM_SHOWN:,} more" if len(wrong) > NUM_SHOWN else ""
    return "; ".join(shown) + more
