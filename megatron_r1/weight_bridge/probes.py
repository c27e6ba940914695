"""The check after a push: engine and trainer must agree on a few tokens' log-probabilities."""

import asyncio
from collections.abc import Sequence

from megatron_r1.engine.errors import EngineDied, EngineError, EngineFault
from megatron_r1.engine.responses import Response
from megatron_r1.fleet.engine import Engine, raise_dead_after
from megatron_r1.trainer_client.client import TrainerClient
from megatron_r1.weight_bridge.set_connector import OnLost

PROBE_TOKENS = 8
EXACT_TOLERANCE, TOLERANCE = 1e-3, 0.3
"""The largest differences where both sides compute in float32, and otherwise. Seen: in float32
about 1e-6, in bfloat16 0.01 to 0.05 (another expert was routed to); weights of another version give
more than 1."""


class Prober:
    """Compares each engine's answers to a few prompts with the trainer.

    prompts: token ids. tolerance: for the mean difference of log-probabilities."""

    def __init__(
        self,
        trainer: TrainerClient,
        prompts: Sequence[Sequence[int]],
        tolerance: float,
        timeout_seconds: float,
    ):
        self.trainer, self.prompts = trainer, prompts
        self.tolerance, self.timeout_seconds = tolerance, timeout_seconds

    async def check(
        self, push: int, engines: Sequence[Engine], on_lost: OnLost
    ) -> dict[str, float]:
        """Sample from each engine and return the largest mean difference, "push/probe_diff".

        Raises EngineError where it exceeds the tolerance."""
        differences: list[float] = []
        for engine in engines if self.prompts else ():
            try:
                difference = await self._difference(engine)
            except EngineDied as death:
                on_lost(engine, death)
                continue
            differences.append(difference)
            if not difference <= self.tolerance:
                raise EngineError(
                    f"after push {push} the log-probabilities of {engine.name} differ from "
                    f"the trainer's by {difference:.3g} in the mean (push.probe_tolerance: "
                    f"{self.tolerance:g}), although every tensor arrived as it was sent: the "
                    "engine loads or computes something else. Nothing was trained on its answers"
                )
        return {"push/probe_diff": max(differences)} if differences else {}

    async def _difference(self, engine: Engine) -> float:
        """Return the mean difference. Raises EngineDied where the engine gives no usable answer."""
        try:
            responses = await self._responses(engine)
        except EngineFault:  # retried once, as every request is
            try:
                responses = await self._responses(engine)
            except EngineFault as fault:
                raise EngineDied(f"{engine.name} did not answer the probes: {fault}") from fault
        return await self.trainer.probe(
            [
                (prompt, response.token_ids, response.logprobs)
                for prompt, (response,) in zip(self.prompts, responses, strict=True)
            ]
        )

    async def _responses(self, engine: Engine) -> list[list[Response]]:
        """Return one response to each prompt."""
        calls = (
            engine.unless_lost(engine.client.generate(prompt, n=1, max_tokens=PROBE_TOKENS, seed=0))
            for prompt in self.prompts
        )
        async with raise_dead_after(engine, self.timeout_seconds):
            return await asyncio.gather(*calls)
