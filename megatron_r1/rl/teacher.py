"""The teacher of on-policy distillation: engines that sample nothing and score every token that the
student wrote (`RolloutFleet.score`). Their weights never change."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from megatron_r1.config import Config
from megatron_r1.config.algorithms import rules_of
from megatron_r1.data.tokenizer import load_tokenizer
from megatron_r1.engine import gpu
from megatron_r1.engine.recipe import (
    check_ranks,
    context_length,
    engine_settings,
    fleet_settings,
    positions,
)
from megatron_r1.fleet.external import ExternalFleet
from megatron_r1.fleet.rollout_fleet import RolloutFleet

NUM_SHOWN = 5
"""Tokens named in an error."""


def teacher_fleet(config: Config, logs: Path, say: Callable[[str], None]) -> RolloutFleet:
    """The engines of `teacher`, to be started on `teacher.path`."""
    teacher = config.teacher
    supervision = {**fleet_settings(teacher), "role": "teacher", "notify": say}
    # vLLM samples one token after those it scores. Where that is beyond the model's positions it
    # has to be allowed; nothing is computed there, as the token is not read again.
    room = context_length(config) + 1
    if teacher.url:
        return ExternalFleet(teacher.url, logs, max_model_len=room, **supervision)
    return RolloutFleet(
        teacher.engines,
        logs,
        device=gpu.device(),
        max_model_len=room,
        prefix_caching=False,  # vLLM computes all of a prompt whose tokens it scores
        extra_args=["--max-num-batched-tokens", str(teacher.tokens_at_once)],
        extra_env={"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"},
        **supervision,
        **engine_settings(teacher),
    )


def check_teacher(config: Config) -> None:
    """Refuse a teacher that cannot score what the student writes, and one that nobody asks.

    Raises:
        ValueError: rl.algorithm wants one and there is none, or the other way round; the folder is
            no model; its context is shorter than the student's; or a token that the student may
            write is another one, or none, to it.
    """
    path, rollout, algorithm = config.teacher.path, config.rollout, config.rl.algorithm
    if bool(path) != rules_of(algorithm).teacher:
        raise ValueError(
            f"teacher.path: {path} would not be asked by rl.algorithm: {algorithm}; set that to "
            "on_policy_distillation, or leave the teacher out"
            if path
            else f"rl.algorithm: {algorithm} learns from a teacher: set teacher.path to its folder"
        )
    if not path:
        return
    hf = _hf_config(path)
    if not config.teacher.url:
        check_ranks(config.teacher, hf, "teacher")
    room, wanted = positions(Path(path) / "config.json", "teacher.path"), context_length(config)
    if room < wanted:
        raise ValueError(
            f"teacher.path {path} has {room} positions (max_position_embeddings), and the student "
            f"writes up to {wanted} tokens with the prompt; set rollout.max_model_len: {room}"
        )
    if (rollout.temperature, rollout.top_p) != (1.0, 1.0):
        raise ValueError(
            f"rollout.temperature: {rollout.temperature:g}, rollout.top_p: {rollout.top_p:g}: the "
            "teacher scores at temperature 1 without a cut, which has to be the student's "
            "distribution too; set both to 1"
        )
    student = _hf_config(config.model.path)
    own, known = (_language(one).get("vocab_size", 0) for one in (student, hf))
    if known < own:
        raise ValueError(
            f"teacher.path {path} knows tokens 0 … {known - 1}, and the student may write any of "
            f"0 … {own - 1}; choose a teacher with a vocab_size of at least {own}"
        )
    own = load_tokenizer(config.model.path, "model.path")
    difference = differing_tokens(own.get_vocab(), load_tokenizer(path, "teacher.path").get_vocab())
    if difference:
        raise ValueError(
            f"teacher.path {path}: its tokenizer is not the student's ({config.model.path}), so "
            f"its log-probabilities are of other texts: {difference}. Choose a teacher of the same "
            "family"
        )


def differing_tokens(student: Mapping[str, int], teacher: Mapping[str, int]) -> str:
    """What of the student's tokens (token → id) the teacher has otherwise; empty: nothing."""
    theirs = {number: token for token, number in teacher.items()}
    wrong = sorted(
        (number, token) for token, number in student.items() if theirs.get(number) != token
    )
    shown = [
        f"{number} is {token!r}, to the teacher {theirs.get(number, 'nothing')!r}"
        for number, token in wrong[:NUM_SHOWN]
    ]
    more = f" and {len(wrong) - NUM_SHOWN:,} more" if len(wrong) > NUM_SHOWN else ""
    return "; ".join(shown) + more


def _hf_config(path: str) -> dict:
    """config.json of any model that vLLM knows."""
    file = Path(path) / "config.json"
    if not file.is_file():
        raise ValueError(f"teacher.path: {file} does not exist; name a Hugging Face model folder")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"teacher.path: {file} is not JSON: {error}") from error


def _language(hf: dict) -> dict:
    """Models that also see keep their language model's settings one level down."""
    return hf.get("text_config") or hf
