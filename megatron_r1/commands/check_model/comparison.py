"""Megatron's and vLLM's log-probabilities of the reference's tokens, against transformers'."""

from __future__ import annotations

import contextlib
import os
from importlib.util import find_spec
from pathlib import Path

from megatron_r1.base.errors import UserError
from megatron_r1.base.processes.logs import file_excerpt
from megatron_r1.commands.check_model.findings import NotCompared, ReferenceResult
from megatron_r1.config import Config
from megatron_r1.controller.trainer_calls.client import TrainerClient
from megatron_r1.engines.fleet.rollout_fleet import RolloutFleet
from megatron_r1.engines.server.cpu_kernels import check_cpu_kernels
from megatron_r1.engines.server.errors import EngineError
from megatron_r1.engines.server.from_config import engine_settings
from megatron_r1.engines.server.limits import check_engines, positions
from megatron_r1.models.hf_config import load_config
from megatron_r1.trainer.operations import ModelOperations
from megatron_r1.trainer.sample import Sample

ENGINE = "engine-0"
MAX_LENGTH = 256
"""The most tokens of a sequence and its one new token; the sequences of the reference are
shorter."""


async def by_megatron(config: Config, reference: ReferenceResult, scratch: Path) -> float:
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
        return (await trainer.call(ModelOperations.probe, samples=samples))["probe/max"]
    finally:
        await trainer.close()


async def by_vllm(
    folder: Path, config: Config, reference: ReferenceResult, scratch: Path
) -> float | NotCompared:
    """Return the largest difference of an engine's log-probabilities, started on the weights in
    `folder`, or why there is none."""
    if find_spec("vllm") is None:
        return NotCompared("vllm is not installed in this environment", is_failure=False)
    try:
        check_engines(config, load_config(folder))
        check_cpu_kernels(config.rollout, load_config(folder))
    except UserError as error:
        return NotCompared(str(error))
    length = min(MAX_LENGTH, positions(folder))
    settings = engine_settings(config.rollout) | {"max_model_len": length, "max_num_seqs": 16}
    async with contextlib.AsyncExitStack() as stack:
        fleet = await stack.enter_async_context(RolloutFleet(1, scratch, **settings))
        try:
            await fleet.start(folder)
            client = fleet.engines[0].client
            scored = [await client.score(ids, 1) for ids in reference.sequences]
        except EngineError as error:
            log = scratch / f"{ENGINE}.log"
            reason = str(error).replace(f"{scratch}{os.sep}", "")  # which is removed in a moment
            if log.name not in reason and log.is_file():
                reason += f"; from {log.name}:\n{file_excerpt(log)}"
            return NotCompared(reason)
    pairs = zip(scored, reference.logprobs, strict=True)
    return max(abs(a - b) for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True))
