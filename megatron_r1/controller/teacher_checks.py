"""What is refused of the teachers of on-policy distillation before their engines start."""

from collections.abc import Mapping

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.config import Config
from megatron_r1.config.algorithms import find_rules
from megatron_r1.data.tokenizer import load_tokenizer
from megatron_r1.engines.server import model_config, recipe_checks
from megatron_r1.engines.server.vllm_arguments import check_arguments
from megatron_r1.models.hf_config import HFConfig, language_settings
from megatron_r1.models.hf_config_file import load_raw_hf_config

NUM_SHOWN = 5
"""Differing tokens that an error names."""


def check_teachers(config: Config) -> None:
    """Refuse a teacher that cannot compute the student's responses or that the algorithm does not
    use, and a missing teacher that the algorithm needs.

    A teacher needs a model folder, at least the student's context length, and the student's ids for
    all of the student's tokens. The student must sample at temperature 1 from the whole
    vocabulary."""
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
    for key, teacher in config.teacher.sections.items():
        hf_config = load_raw_hf_config(teacher.path, f"{key}.path")
        if not teacher.url:
            recipe_checks.check_ranks(teacher, hf_config, key)
            check_arguments(teacher, key)
        _check_positions(config, teacher.path, f"{key}.path")
        _check_vocabulary(config, teacher.path, f"{key}.path", hf_config)
    if path:
        _check_temperature(config)


def _check_positions(config: Config, path: str, key: str) -> None:
    """Raise UserError where the student's context is longer than the teacher's.

    Args:
        config: the recipe.
        path: the teacher's folder.
        key: its key in the recipe."""
    limit, num_tokens = model_config.max_positions(path, key), model_config.max_model_len(config)
    if limit < num_tokens:
        raise UserError(
            f"{key} {path} has {limit} positions (max_position_embeddings), and the student "
            f"writes up to {num_tokens} tokens with the prompt; set rollout.max_model_len: {limit}",
            key=key,
            cause=Cause.TOO_LARGE,
        )


def _check_temperature(config: Config) -> None:
    """Raise UserError where the student, at any step, samples at another temperature than 1, at
    which the teacher computes. With a cut (`rollout.top_p`) the student is the truncated policy,
    and the advantages are those of its KL from the teacher over the whole vocabulary."""
    for step, part in config.schedule_parts():
        if part.rollout.temperature == 1.0:
            continue
        prefix = f"rl.schedule, from_step {step}: " if step > 1 else ""
        raise UserError(
            f"{prefix}rollout.temperature: {part.rollout.temperature}: the teacher computes at "
            "temperature 1, which has to be the student's too; set rollout.temperature: 1",
            key="rollout.temperature",
            cause=Cause.CONFLICT,
        )


def _check_vocabulary(config: Config, path: str, key: str, hf_config: HFConfig) -> None:
    """Raise UserError where a token of the student is none, or another one, to the teacher.

    Args:
        config: the recipe.
        path: the teacher's folder.
        key: its key in the recipe.
        hf_config: its config.json."""
    student = load_raw_hf_config(config.model.path)
    student_size, teacher_size = (
        language_settings(values).get("vocab_size", 0) for values in (student, hf_config)
    )
    if teacher_size < student_size:
        raise UserError(
            f"{key} {path} knows tokens 0 … {teacher_size - 1}, and the student may write any of "
            f"0 … {student_size - 1}; choose a teacher with a vocab_size of at least "
            f"{student_size}",
            key=key,
            cause=Cause.CONFLICT,
        )
    tokenizer = load_tokenizer(config.model.path, "model.path")
    vocabulary = load_tokenizer(path, key).get_vocab()
    if difference := differing_tokens(tokenizer.get_vocab(), vocabulary):
        raise UserError(
            f"{key} {path}: its tokenizer is not the student's ({config.model.path}), so "
            f"its log-probabilities are of other texts: {difference}. Choose a teacher of the same "
            "family",
            key=key,
            cause=Cause.CONFLICT,
        )


def differing_tokens(student: Mapping[str, int], teacher: Mapping[str, int]) -> str:
    """Describe the student's tokens (token → id) that have another id with the teacher; "" if none
    has."""
    by_id = {number: token for token, number in teacher.items()}
    wrong_tokens = sorted(
        (number, token) for token, number in student.items() if by_id.get(number) != token
    )
    differences = [
        f"{number} is {token!r}, to the teacher {by_id.get(number, 'nothing')!r}"
        for number, token in wrong_tokens[:NUM_SHOWN]
    ]
    remainder = (
        f" and {len(wrong_tokens) - NUM_SHOWN:,} more" if len(wrong_tokens) > NUM_SHOWN else ""
    )
    return "; ".join(differences) + remainder
