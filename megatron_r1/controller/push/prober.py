"""Compares what engines compute with pushed weights with what the trainer computes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from megatron_r1.controller.push.engine_links import OnEngineLost
from megatron_r1.controller.trainer_calls.client import TrainerClient
from megatron_r1.engines.fleet.engine import Engine, raise_dead_after
from megatron_r1.engines.server.errors import EngineDied, EngineError, EngineFault

T = TypeVar("T")
PROBE_TOKENS = 8
EXACT_TOLERANCE, TOLERANCE = 1e-3, 0.3
"""The largest differences where both sides compute in float32, and otherwise. Seen: in float32
about 1e-6, in bfloat16 0.01 to 0.05 (another expert was routed to); weights of another version give
more than 1."""


class Prober:
    """Compares each engine's answers to a few prompts with the trainer.

    Attributes:
        prompts: the token ids of each prompt.
        tolerance: the largest mean difference of log-probabilities that is no fault."""

    def __init__(
        self,
        trainer: TrainerClient,
        prompts: Sequence[Sequence[int]],
        tolerance: float,
        timeout_seconds: float,
    ):
        self.trainer, self.prompts = trainer, prompts
        self.tolerance, self.timeout_seconds = tolerance, timeout_seconds

    async def prepare(self) -> None:
        """Do nothing: the trainer has its weights when engines answer (`OffloadedProber`)."""

    async def check(
        self, push_number: int, engines: Sequence[Engine], on_engine_lost: OnEngineLost
    ) -> dict[str, float]:
        """Sample from each engine and return the largest mean difference, "push/probe_diff".

        Args:
            push_number: the number of the push.
            engines: the engines that have loaded it.
            on_engine_lost: called with an engine that does not answer, and the error.

        Raises:
            EngineError: the difference exceeds the tolerance.
        """
        probed_engines = engines if self.prompts else ()
        # All at once: an answer takes several of an engine's steps.
        outcomes = await asyncio.gather(
            *map(self._probe_diff, probed_engines), return_exceptions=True
        )
        differences: list[float] = []
        for engine, difference in zip(probed_engines, outcomes, strict=True):
            if isinstance(difference, EngineDied):
                on_engine_lost(engine, difference)
                continue
            if isinstance(difference, BaseException):
                raise difference
            differences.append(difference)
            if not difference <= self.tolerance:
                raise EngineError(
                    f"after push {push_number} the log-probabilities of {engine.name} differ from "
                    f"the trainer's by {difference:.3g} in the mean (push.probe_tolerance: "
                    f"{self.tolerance:g}), although every tensor arrived as it was sent: the "
                    "engine loads or computes something else. Nothing was trained on its answers"
                )
        return {"push/probe_diff": max(differences)} if differences else {}

    async def _probe_diff(self, engine: Engine) -> float:
        """Return the mean absolute difference of the engine's log-probabilities from the trainer's,
        in nats.

        Raises:
            EngineDied: the engine gives no usable answer.
        """
        responses = await self._engine_answers(
            engine,
            lambda prompt: engine.client.generate(prompt, n=1, max_tokens=PROBE_TOKENS, seed=0),
        )
        return await self.trainer.probe(
            [
                (prompt, response.token_ids, response.logprobs)
                for prompt, (response,) in zip(self.prompts, responses, strict=True)
            ]
        )

    async def _engine_answers(
        self, engine: Engine, ask: Callable[[Sequence[int]], Coroutine[Any, Any, T]]
    ) -> list[T]:
        """Return the engine's answer to each prompt.

        Raises:
            EngineDied: the engine gives no usable answer.
        """
        for is_last in (False, True):  # retried once, as every request is
            try:
                async with raise_dead_after(engine, self.timeout_seconds):
                    calls = (engine.await_unrepeatable_call(ask(prompt)) for prompt in self.prompts)
                    return await asyncio.gather(*calls)
            except EngineFault as fault:
                if is_last:
                    raise EngineDied(f"{engine.name} did not answer the probes: {fault}") from fault
        raise AssertionError("returned or raised above")


class OffloadedProber(Prober):
    """Probes engines that compute in the memory of the trainer's weights
    (`parallel.offload_between_phases`). The trainer computes the prompts' log-probabilities
    while it has its weights, and the engines later."""

    async def prepare(self) -> None:
        """Have the trainer compute the probe prompts before it lends its memory to the engines."""
        self.prompts = [prompt for prompt in self.prompts if len(prompt) > 1]
        if self.prompts:
            await self.trainer.prepare_probe(self.prompts)

    async def _probe_diff(self, engine: Engine) -> float:
        logprobs = await self._engine_answers(
            engine, lambda prompt: engine.client.compute_logprobs(prompt, 1)
        )
        return await self.trainer.compare_probe(self.prompts, logprobs)
