"""A Hugging Face folder served by vLLM engines of this evaluation's own."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from megatron_r1.config import Config
from megatron_r1.data.shots import FewShotText, Shots
from megatron_r1.data.text import PromptText
from megatron_r1.engine import gpu
from megatron_r1.engine.recipe import check_engines, context_length, engine_settings, fleet_settings
from megatron_r1.evaluation.model_folder import fingerprint, require_weights
from megatron_r1.evaluation.policy import Decoding
from megatron_r1.evaluation.response import TextResponse
from megatron_r1.fleet.placement import check_room, growing, open_pool, server_maker
from megatron_r1.fleet.rollout_fleet import RolloutFleet


class EnginePolicy:
    """The same engines, prompts, sampling and hosts as in training (`rollout`)."""

    def __init__(
        self,
        config: Config,
        model: Path,
        decoding: Decoding,
        folder: Path,
        shots: Shots | None = None,
    ) -> None:
        """folder: of the evaluation or sampling; gets `logs/`, and engine hosts look there for
        their controller. shots: worked examples before every question. Raises ValueError for a
        model without config, weights or tokenizer."""
        require_weights(model)
        config = config.model_copy(
            update={"model": config.model.model_copy(update={"path": str(model)})}
        )
        rollout = config.rollout
        self._config, self._model, self._decoding = config, model, decoding
        self._folder = folder
        template = config.data.template
        self._text = (
            FewShotText(str(model), template, shots) if shots else PromptText(str(model), template)
        )
        self._room = context_length(config)
        check_room(rollout)
        check_engines(config, json.loads((model / "config.json").read_text(encoding="utf-8")))
        self._fleet: RolloutFleet | None = None
        self._open = contextlib.AsyncExitStack()
        self.concurrency = rollout.engines * rollout.data * rollout.max_num_seqs
        self.identity: dict[str, Any] = {
            "weights": fingerprint(model),
            "rollout.dtype": rollout.dtype,
            "rollout.max_model_len": self._room,
            "data.template": config.data.template,
        }

    async def start(self) -> None:
        def say(message: str) -> None:
            print(message, flush=True)

        rollout = self._config.rollout
        # Engines read the weights from the model's folder: no memory need be shared with a trainer.
        hosts = await self._open.enter_async_context(open_pool(rollout, self._folder, False, say))
        self._fleet = RolloutFleet(
            rollout.engines,
            self._folder / "logs",
            notify=say,
            make_server=server_maker(hosts),
            device=gpu.device(),
            max_model_len=self._room,
            **fleet_settings(rollout),
            **engine_settings(rollout),
        )
        self._open.push_async_callback(self._fleet.close)
        await self._fleet.start(self._model)
        await self._open.enter_async_context(growing(self._fleet, hosts))

    async def respond(self, question: str, seed: int) -> TextResponse:
        assert self._fleet is not None, "start() was not called"
        opened = self._text.opens_thought
        prompt_ids = self._text.encode(question)
        # One token of room is no room for an answer, but it is a request the engine can take.
        if len(prompt_ids) >= self._room:
            refusal = f"the prompt has {len(prompt_ids)} tokens, the model room for {self._room}"
            return TextResponse("", 0, False, opened, refusal)
        [completion] = await self._fleet.generate(
            prompt_ids,
            n=1,
            max_tokens=min(self._decoding.max_tokens, self._room - len(prompt_ids)),
            temperature=self._decoding.temperature,
            top_p=self._decoding.top_p,
            stop_token_ids=[self._text.end],
            seed=seed,
        )
        return TextResponse(
            self._text.decode(completion.token_ids),
            len(completion.token_ids),
            completion.finish_reason == "length",
            opened,
        )

    async def close(self) -> None:
        await self._open.aclose()
