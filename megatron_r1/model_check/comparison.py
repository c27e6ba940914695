"""Megatron's and vLLM's log-probabilities of the reference's tokens, against transformers'."""

from __future__ import annotations

import contextlib
from importlib.util import find_spec
from pathlib import Path

from megatron_r1.config import Config
from megatron_r1.engine.errors import EngineError
from megatron_r1.engine.from_config import engine_settings
from megatron_r1.fleet.rollout_fleet import RolloutFleet
from megatron_r1.model_check.findings import Reference
from megatron_r1.trainer_client.client import TrainerClient
from megatron_r1.training.wire import Sample

NOT_RUN = "NOT RUN"


async def by_megatron(config: Config, reference: Reference, scratch: Path) -> float:
    """Return the largest difference of the trainer's log-probabilities, in the layout of
    `config.parallel`. Raises UserError for a layout that cannot be, TrainerError where a rank
    fails."""
    samples = [
        Sample.pack(ids[:1], ids[1:], logprobs)
        for ids, logprobs in zip(reference.sequences, reference.logprobs, strict=True)
    ]
    trainer = TrainerClient(config, scratch)
    trainer.launch()
    try:
        await trainer.connect()
        return (await trainer.call("probe", samples=samples))["probe/max"]
    finally:
        await trainer.close()


async def by_vllm(folder: Path, config: Config, reference: Reference, scratch: Path) -> float | str:
    """Return the largest difference of an engine's log-probabilities, started on the weights in
    `folder`, or why there is none."""
    if find_spec("vllm") is None:
        return f"{NOT_RUN}: vllm is not installed in this environment"
    settings = engine_settings(config.rollout) | {"max_model_len": 256, "max_num_seqs": 16}
    async with contextlib.AsyncExitStack() as stack:
        fleet = await stack.enter_async_context(RolloutFleet(1, scratch, **settings))
        try:
            await fleet.start(folder)
            client = fleet.engines[0].client
            scored = [await client.score(ids, 1) for ids in reference.sequences]
        except EngineError as error:
            return f"FAILED: {error}"
    pairs = zip(scored, reference.logprobs, strict=True)
    return max(abs(a - b) for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True))
