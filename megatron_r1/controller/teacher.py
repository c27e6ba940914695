"""The teacher of on-policy distillation: engines that only score the tokens which the student
sampled (`RolloutFleet.compute_logprobs`). Their weights never change. They are started here, or run
already: vLLM servers which others have started, and which are neither started nor stopped here."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.config import Config
from megatron_r1.config.algorithms import find_rules
from megatron_r1.data.tokenizer import load_tokenizer
from megatron_r1.engines.fleet.engine import Engine
from megatron_r1.engines.fleet.rollout_fleet import RolloutFleet
from megatron_r1.engines.server import gpu, model_config, recipe_checks, settings
from megatron_r1.engines.server.client import GENERATE, EngineClient
from megatron_r1.engines.server.responses import EngineError
from megatron_r1.engines.server.server import RunningServer
from megatron_r1.engines.server.vllm_arguments import check_arguments
from megatron_r1.models.hf_config import language_settings, load_config

EXTERNAL_ANSWER_SECONDS = 30.0
"""The time limit of a request that checks a server."""


class ExternalFleet(RolloutFleet):
    """A fleet of servers that run already. A lost one may return within the time that an engine
    gets to start; the others go on meanwhile.

    Args:
        urls: the addresses of the servers.
        log_folder: the folder for what the fleet writes of them.
        max_model_len: the tokens that each server must have room for.
        **settings: arguments of `RolloutFleet`.
    """

    def __init__(
        self, urls: Sequence[str], log_folder: Path, *, max_model_len: int, **settings: Any
    ) -> None:
        super().__init__(len(urls), log_folder, max_model_len=max_model_len, **settings)
        self.urls = list(urls)

    def launch(self, index: int) -> Engine:
        """Return the engine at the URL `index`, which runs already."""
        server = ExternalServer(self.urls[index], self.server_settings["max_model_len"])
        client = ExternalClient(server.url, timeout_seconds=self.request_timeout_seconds)
        return Engine(index, server, client, role=self.role)


class ExternalClient(EngineClient):
    """A client that does not rename the server's weights."""

    async def set_policy_version(self, policy_version: int) -> None:
        """Do nothing: an engine that is not ours has no version of our weights."""


class ExternalServer(RunningServer):
    """A server that runs already. Only its answers show whether it is alive."""

    poll_seconds = 1.0

    def __init__(self, url: str, max_model_len: int) -> None:
        super().__init__(url.rstrip("/"))
        self.max_model_len = max_model_len
        self._failure: Exception | None = None

    async def wait_ready(self, timeout_seconds: float = 300.0) -> None:
        """Wait until the server answers, and check that it can score.

        Raises:
            EngineError: the server does not answer in time, has too little room, or cannot score
                tokens.
        """
        await super().wait_ready(timeout_seconds)
        async with EngineClient(self.url, timeout_seconds=EXTERNAL_ANSWER_SECONDS) as client:
            sampling = {"max_tokens": 1, "prompt_logprobs": 0, "detokenize": False}
            call = {"token_ids": [0, 0], "sampling_params": sampling}
            try:
                await client.request("POST", GENERATE, call)
            except EngineError as error:
                raise EngineError(
                    f"{error}: start the server with --enable-scale-out, which adds this address"
                ) from error

    async def _is_ready(self) -> bool:
        try:
            async with EngineClient(self.url, timeout_seconds=EXTERNAL_ANSWER_SECONDS) as client:
                [card, *_] = msgspec.json.decode(await client.request("GET", "/v1/models"))["data"]
        except (EngineError, ValueError, KeyError) as error:
            self._failure = error
            return False
        room = card.get("max_model_len")
        if room is not None and room < self.max_model_len:
            raise EngineError(
                f"{self.url} has room for {room} tokens, {self.max_model_len} are needed: start it "
                f"with --max-model-len {self.max_model_len}"
            )
        return True

    def _why_not_ready(self) -> str:
        return f"{super()._why_not_ready()}: {self._failure}"


NUM_SHOWN = 5
"""Differing tokens that an error names."""


def teacher_fleet(config: Config, logs: Path, notify: Callable[[str], None]) -> RolloutFleet:
    """Return the engines of section `teacher`, to be started with the model `teacher.path`.

    Args:
        config: the recipe.
        logs: the folder of the engines' logs.
        notify: called with a line when an engine is replaced."""
    teacher = config.teacher
    supervision = {**settings.fleet_settings(teacher), "role": "teacher", "notify": notify}
    # vLLM samples one token after those it scores. If that is beyond the model's positions it must
    # be allowed; nothing is computed there, as the token is not an input.
    max_model_len = model_config.max_model_len(config) + 1
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
        **settings.engine_settings(teacher),
    )


def check_teacher(config: Config) -> None:
    """Raise UserError for a teacher that cannot score the student's responses, that the algorithm
    does not use, or that it needs and that is not set.

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
    if not path:
        return
    hf = load_config(path, "teacher.path")
    if not config.teacher.url:
        recipe_checks.check_ranks(config.teacher, hf, "teacher")
        check_arguments(config.teacher, "teacher")
    _check_positions(config)
    _check_sampling(config)
    _check_vocabulary(config, hf)


def _check_positions(config: Config) -> None:
    """Raise UserError where the student's context is longer than the teacher's."""
    path = config.teacher.path
    limit, needed = (
        model_config.max_positions(path, "teacher.path"),
        model_config.max_model_len(config),
    )
    if limit < needed:
        raise UserError(
            f"teacher.path {path} has {limit} positions (max_position_embeddings), and the student "
            f"writes up to {needed} tokens with the prompt; set rollout.max_model_len: {limit}",
            key="teacher.path",
            cause=Cause.TOO_LARGE,
        )


def _check_sampling(config: Config) -> None:
    """Raise UserError where the student, at any step, samples another distribution than the one
    that the teacher scores."""
    for step, phase in config.phases():
        rollout = phase.rollout
        if rollout.temperature == 1.0 and not rollout.truncates_sampling:
            continue
        when = f"rl.schedule, from_step {step}: " if step > 1 else ""
        limit = "top_p" if rollout.top_p < 1 else "min_p" if rollout.min_p else "top_k"
        name = "temperature" if rollout.temperature != 1.0 else limit
        raise UserError(
            f"{when}rollout.{name}: {getattr(rollout, name)}: the teacher scores at temperature 1 "
            "over the whole vocabulary, which has to be the student's distribution too; set "
            "rollout.temperature: 1 and leave out rollout.top_p, top_k and min_p",
            key=f"rollout.{name}",
            cause=Cause.CONFLICT,
        )


def _check_vocabulary(config: Config, hf: dict) -> None:
    """Raise UserError where a token of the student is none, or another one, to the teacher.

    Args:
        config: the recipe.
        hf: the teacher's config.json."""
    path, student = config.teacher.path, load_config(config.model.path)
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
