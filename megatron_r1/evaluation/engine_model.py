"""A model folder served by vLLM engines that this command starts."""

import contextlib
import itertools
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from r1_grading.terms import ACCURACY

from megatron_r1.agents.environment_pool import EnvironmentPool, describe_in_subprocess
from megatron_r1.agents.player import EpisodePlayer
from megatron_r1.base.errors import Cause, RunError, UserError
from megatron_r1.config import AgentsConfig, Config
from megatron_r1.data.chats import Message
from megatron_r1.data.few_shot import FewShotExamples, FewShotTokenizer
from megatron_r1.data.prompt import Prompt
from megatron_r1.data.prompt_tokenizer import PromptTokenizer
from megatron_r1.engines.fleet.engine_fleet import EngineFleet
from megatron_r1.engines.fleet.joining_hosts import accepting_hosts
from megatron_r1.engines.fleet.placement import check_room, open_host_pool, server_maker
from megatron_r1.engines.server import gpu
from megatron_r1.engines.server.cpu_kernel_checks import check_cpu_kernels
from megatron_r1.engines.server.model_config import max_model_len
from megatron_r1.engines.server.recipe_checks import check_engines, check_local_engines
from megatron_r1.engines.server.recipe_settings import engine_settings, fleet_settings
from megatron_r1.engines.server.responses import Response
from megatron_r1.engines.server.stop_strings import truncate_at_stop
from megatron_r1.engines.server.vllm_arguments import check_arguments
from megatron_r1.evaluation.identity import fingerprint_model
from megatron_r1.evaluation.model_folder import require_weights
from megatron_r1.evaluation.response import TextResponse
from megatron_r1.evaluation.sampling_settings import SamplingSettings
from megatron_r1.models.hf_config_file import describe_config_changes, load_raw_hf_config

ATTEMPTS = 3
"""Episodes that are tried for one sample: one that fails by no fault of the model is repeated."""


class EngineModel:
    """Uses the same engines, prompts, sampling and hosts as training (`rollout`).

    Args:
        config: the recipe.
        model: a folder in Hugging Face format.
        decoding: temperature, cut and limit.
        folder: `run.folder`; `logs/` and the address for engine hosts are written there.
        shots: worked examples before every question.

    Raises:
        ValueError: for a model without config, weights or tokenizer.
    """

    def __init__(
        self,
        config: Config,
        model: Path,
        decoding: SamplingSettings,
        folder: Path,
        shots: FewShotExamples | None,
    ) -> None:
        require_weights(model)
        config = config.with_changes(model={"path": str(model)})
        rollout, source = config.rollout, (str(model), config.data.template)
        self._config, self._model, self._decoding = config, model, decoding
        self._folder = folder
        ids = rollout.stop_token_ids
        self._tokenizer = (
            FewShotTokenizer(*source, shots, ids)
            if shots
            else PromptTokenizer(*source, stop_token_ids=ids)
        )
        self._max_model_len = max_model_len(config)
        check_room(rollout)
        hf_config = load_raw_hf_config(model)
        check_engines(config, hf_config)
        check_local_engines(rollout)
        check_cpu_kernels(rollout, hf_config)
        check_arguments(rollout, "rollout")
        self._fleet: EngineFleet | None = None
        self._resources = contextlib.AsyncExitStack()
        self._players: dict[str, EpisodePlayer] = {}
        self.concurrency = rollout.engines * rollout.data_parallel * rollout.max_num_seqs
        self.identity: dict[str, Any] = {
            "weights": fingerprint_model(model),
            "rollout.dtype": rollout.dtype,
            "rollout.max_model_len": self._max_model_len,
            "data.template": config.data.template,
            "rollout.stop": rollout.stop,
            "end tokens": self._tokenizer.stop_token_ids,
        }

    async def start(self) -> None:
        """Start the engines on the model's weights.

        Raises:
            EngineError: an engine does not start.
            UserError: the port for engine hosts is taken, or this host's name does not resolve.
        """
        log = partial(print, flush=True)
        for sentence in describe_config_changes(self._model):
            log(sentence)
        rollout = self._config.rollout
        # False: no trainer shares memory with the engines, which load the model's folder.
        hosts = await self._resources.enter_async_context(
            open_host_pool(rollout, self._folder, False, log)
        )
        self._fleet = EngineFleet(
            rollout.engines,
            self._folder / "logs",
            notify=log,
            make_server=server_maker(hosts),
            device=gpu.engine_device(),
            max_model_len=self._max_model_len,
            **fleet_settings(rollout),
            **engine_settings(rollout),
        )
        self._resources.push_async_callback(self._fleet.close)
        await self._fleet.start(self._model)
        await self._resources.enter_async_context(accepting_hosts(self._fleet, hosts))

    async def respond(
        self, question: str, seed: int, before: Sequence[Message] = ()
    ) -> TextResponse:
        """Sample one response. A prompt that leaves no room for a response is refused.

        Args:
            question: the user's last message.
            seed: the seed of the sampling.
            before: the messages before the question."""
        thought_opened = self._tokenizer.opens_thought
        prompt_ids = self._tokenizer.encode(question, before)
        if len(prompt_ids) >= self._max_model_len:
            limit = self._max_model_len
            refusal = f"the prompt has {len(prompt_ids)} tokens, and the model takes {limit}"
            return TextResponse("", num_tokens=0, thought_opened=thought_opened, refusal=refusal)
        max_tokens = min(self._decoding.max_tokens, self._max_model_len - len(prompt_ids))
        response = await self._generate_response(prompt_ids, max_tokens, seed)
        ids, is_truncated = response.token_ids, response.finish_reason == "length"
        return TextResponse(
            self._tokenizer.decode(ids),
            len(ids),
            is_truncated=is_truncated,
            thought_opened=thought_opened,
        )

    async def check(self, agents: AgentsConfig, prompts: Sequence[Prompt]) -> None:
        """Begin an episode for one prompt of each set of fields.

        Raises:
            UserError: a template other than chat, or an environment that fails.
        """
        if self._config.data.template != "chat":
            raise UserError(
                f"data.template: {self._config.data.template!r} renders one question; environment "
                f"{agents.environment} needs data.template: chat",
                key="data.template",
                cause=Cause.CONFLICT,
            )
        await self._episode_player(agents).check(prompts)

    async def play(self, agents: AgentsConfig, prompt: Prompt, seed: int) -> TextResponse:
        """Play one episode; its turns are sampled with the seeds from `seed` on.

        Args:
            agents: the environment and its limits.
            prompt: the prompt that the episode begins with.
            seed: the seed of the first turn.

        Raises:
            RunError: ATTEMPTS episodes failed by no fault of the model, or no engine is left."""
        fleet = self._fleet
        assert fleet is not None, "start() was not called"
        seeds = itertools.count(seed)

        async def answer(token_ids: Sequence[int], max_tokens: int) -> Response:
            return await self._generate_response(token_ids, max_tokens, next(seeds))

        for _ in range(ATTEMPTS):
            played = await self._episode_player(agents).play(
                prompt, answer, self._decoding.max_tokens
            )
            # Without an engine every further episode would fail: the fleet's error has the cause.
            fleet.state.require_usable()
            episode = played.episode
            if episode.has_reward:
                break
        else:
            raise RunError(
                f"environment {agents.environment}, row {prompt.id}: {ATTEMPTS} episodes ended as "
                f"{episode.status}: {episode.reason}; repair it, the same command continues"
            )
        reward = played.reward
        return TextResponse(
            played.text,
            len(episode.response().token_ids),
            episode.status == "max_tokens",
            self._tokenizer.opens_thought,
            rewards={} if reward is None else {ACCURACY: reward},
            reward=reward,
            reason="" if reward is None else f"{episode.status}: the environment's reward",
            episode=episode.record(),
        )

    async def _generate_response(
        self, token_ids: Sequence[int], max_tokens: int, seed: int
    ) -> Response:
        assert self._fleet is not None, "start() was not called"
        [response] = await self._fleet.generate(
            token_ids,
            n=1,
            max_tokens=max_tokens,
            temperature=self._decoding.temperature,
            top_p=self._decoding.top_p,
            top_k=self._decoding.top_k,
            min_p=self._decoding.min_p,
            stop_token_ids=self._tokenizer.stop_token_ids,
            seed=seed,
        )
        stop = self._decoding.stop
        return (
            truncate_at_stop(response, len(token_ids), stop, self._tokenizer.decode)[0]
            if stop
            else response
        )

    def _episode_player(self, agents: AgentsConfig) -> EpisodePlayer:
        key = agents.model_dump_json()
        if key not in self._players:
            environments = EnvironmentPool(agents, describe_in_subprocess(agents.environment))
            player = EpisodePlayer(self._tokenizer, environments, agents, self._max_model_len)
            self._resources.push_async_callback(player.close)
            self._players[key] = player
        return self._players[key]

    async def close(self) -> None:
        """Stop the engines and close what else the model opened."""
        await self._resources.aclose()
