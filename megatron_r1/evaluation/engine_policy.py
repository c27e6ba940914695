"""A Hugging Face folder served by vLLM engines of this evaluation's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_r1.config import Config
from megatron_r1.data.shots import FewShotText, Shots
from megatron_r1.data.text import PromptText
from megatron_r1.evaluation.model_folder import fingerprint
from megatron_r1.evaluation.policies import Answer, Decoding
from megatron_r1.rollout.context import context_length
from megatron_r1.rollout.fleet import RolloutFleet
from megatron_r1.rollout.parallelism import check_engines, engine_settings


class EnginePolicy:
    """The same engines, prompts and sampling as in training (`rollout`)."""

    def __init__(
        self,
        config: Config,
        model: Path,
        decoding: Decoding,
        log_folder: Path,
        shots: Shots | None = None,
    ) -> None:
        """shots: worked examples before every question. Raises ValueError for a folder without
        config or tokenizer, and for engines on other hosts."""
        if config.rollout.placement != "local":
            raise ValueError(
                f"rollout.placement: {config.rollout.placement} is for rl: sample and eval start "
                "engines on this host; leave it out, or name a served model (sample.server, "
                "eval.server)"
            )
        config = config.model_copy(
            update={"model": config.model.model_copy(update={"path": str(model)})}
        )
        rollout = config.rollout
        self._config, self._model, self._decoding = config, model, decoding
        self._log_folder = log_folder
        template = config.data.template
        self._text = (
            FewShotText(str(model), template, shots) if shots else PromptText(str(model), template)
        )
        self._room = context_length(config)
        check_engines(config, json.loads((model / "config.json").read_text(encoding="utf-8")))
        self._fleet: RolloutFleet | None = None
        self.concurrency = rollout.engines * rollout.data * rollout.max_num_seqs
        self.identity: dict[str, Any] = {
            "weights": fingerprint(model),
            "rollout.dtype": rollout.dtype,
            "rollout.max_model_len": self._room,
            "data.template": config.data.template,
        }

    async def start(self) -> None:
        from megatron_r1 import platform  # imports torch

        rollout = self._config.rollout
        self._fleet = RolloutFleet(
            rollout.engines,
            self._log_folder,
            start_timeout_seconds=rollout.start_timeout_seconds,
            request_timeout_seconds=rollout.request_timeout_seconds,
            max_restarts=rollout.max_restarts,
            unresponsive_seconds=rollout.unresponsive_seconds,
            say=lambda message: print(message, flush=True),
            device="cuda" if platform.has_gpu() else "cpu",
            max_model_len=self._room,
            **engine_settings(rollout),
        )
        await self._fleet.start(self._model)

    async def answer(self, question: str, seed: int) -> Answer:
        assert self._fleet is not None, "start() was not called"
        opened = self._text.opens_thought
        prompt_ids = self._text.encode(question)
        # One token of room is no room for an answer, but it is a request the engine can take.
        if len(prompt_ids) >= self._room:
            refusal = f"the prompt has {len(prompt_ids)} tokens, the model room for {self._room}"
            return Answer("", 0, False, opened, refusal)
        [completion] = await self._fleet.generate(
            prompt_ids,
            n=1,
            max_tokens=min(self._decoding.max_tokens, self._room - len(prompt_ids)),
            temperature=self._decoding.temperature,
            top_p=self._decoding.top_p,
            stop_token_ids=[self._text.end],
            seed=seed,
        )
        return Answer(
            self._text.decode(completion.token_ids),
            len(completion.token_ids),
            completion.finish_reason == "length",
            opened,
        )

    async def close(self) -> None:
        if self._fleet is not None:
            await self._fleet.close()
