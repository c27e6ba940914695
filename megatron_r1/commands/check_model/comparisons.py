"""Compares log-probabilities of Megatron and of vLLM with the reference's."""

from __future__ import annotations

import contextlib
from importlib.util import find_spec
from pathlib import Path

from megatron_r1.base.errors import UserError
from megatron_r1.commands.check_model.results import NotCompared, ReferenceResult
from megatron_r1.config import Config
from megatron_r1.controller.trainer_calls.client import TrainerClient
from megatron_r1.engines.fleet.engine_fleet import EngineFleet
from megatron_r1.engines.server.cpu_kernel_checks import check_cpu_kernels
from megatron_r1.engines.server.errors import EngineError, with_log_excerpt
from megatron_r1.engines.server.model_config import max_positions
from megatron_r1.engines.server.recipe_checks import check_engines, check_local_engines
from megatron_r1.engines.server.recipe_settings import engine_settings
from megatron_r1.engines.server.vllm_arguments import check_arguments
from megatron_r1.models.hf_config_file import load_raw_hf_config
from megatron_r1.trainer.operations import EvaluationOperations
from megatron_r1.trainer.training_sample import Sample

ENGINE_NAME = "engine-0"
MAX_LENGTH = 256
"""The most tokens of a sequence and its one new token; the sequences of the reference are
shorter."""


async def compare_with_megatron(config: Config, reference: ReferenceResult, scratch: Path) -> float:
    """Return the largest difference of the trainer's log-probabilities, in the layout of
    `config.parallel`.

    Args:
        config: the recipe of the check.
        reference: what transformers has computed.
        scratch: a folder for the run's files.

    Raises:
        UserError: an impossible layout.
        TrainerError: a rank fails."""
    samples = [
        Sample.pack(ids[:1], ids[1:], logprobs)
        for ids, logprobs in zip(reference.sequences, reference.logprobs, strict=True)
    ]
    trainer = TrainerClient(config, scratch)
    trainer.launch()
    try:
        await trainer.connect()
        return (await trainer.call(EvaluationOperations.probe, samples=samples))["probe/max"]
    finally:
        await trainer.close()


async def compare_with_vllm(
    folder: Path, config: Config, reference: ReferenceResult, scratch: Path
) -> float | NotCompared:
    """Compare an engine's log-probabilities, started on the weights in `folder`, with the
    reference's.

    Args:
        folder: the Hugging Face folder.
        config: the recipe, whose section `rollout` the engine gets.
        reference: the sequences, and transformers' log-probabilities of them.
        scratch: a folder for the engine's log and sockets.

    Returns:
        The largest absolute difference in nats, or why none was measured."""
    if find_spec("vllm") is None:
        return NotCompared("vllm is not installed in this environment", is_failure=False)
    try:
        check_engines(config, load_raw_hf_config(folder))
        check_local_engines(config.rollout)
        check_cpu_kernels(config.rollout, load_raw_hf_config(folder))
        check_arguments(config.rollout, "rollout")
    except UserError as error:
        return NotCompared(str(error))
    length = min(MAX_LENGTH, max_positions(folder))
    settings = engine_settings(config.rollout) | {"max_model_len": length, "max_num_seqs": 16}
    async with contextlib.AsyncExitStack() as stack:
        fleet = await stack.enter_async_context(EngineFleet(1, scratch, **settings))
        try:
            await fleet.start(folder)
            client = fleet.engines[0].client
            replies = [await client.compute_logprobs(ids, 1) for ids in reference.sequences]
        except EngineError as error:
            return NotCompared(with_log_excerpt(error, scratch, ENGINE_NAME))
    pairs = zip(replies, reference.logprobs, strict=True)
    return max(
        abs(a - b) for computed, expected in pairs for a, b in zip(computed, expected, strict=True)
    )
