"""Reinforcement learning from rule-based rewards: R1-Zero, and R1's reasoning stage."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
from pathlib import Path

from megatron_r1.config import Config
from megatron_r1.data.prompts import PromptSplit, load_prompts
from megatron_r1.data.sampler import PromptSampler
from megatron_r1.data.text import PromptText
from megatron_r1.reporting.recorder import Recorder
from megatron_r1.rewards.pool import RewardPool
from megatron_r1.rl.loop import train
from megatron_r1.rl.session import Session
from megatron_r1.rollout.fleet import RolloutFleet
from megatron_r1.rollout.sampling import Rollouts
from megatron_r1.stages.launch import run_stage
from megatron_r1.stopping import StopRequest
from megatron_r1.training.client import TrainerClient

REQUIRED = ("run.folder", "model.path")
SHARED_MEMORY = Path("/dev/shm")


def run(config: Config) -> None:
    """Train for `run.steps` rollouts. Raises ValueError before any long work starts."""
    if config.model.init != "load":
        raise ValueError("model.init: rl needs a model to start from; make one with sft, then load")
    text = PromptText(config.model.path, config.data.template)
    questions = config.data.model_dump(exclude={"template"})
    prompts = load_prompts(**questions)
    facts = [
        config.model.path,
        config.data.task or str(config.data.path),
        f"{len(prompts.train):,} questions, {len(prompts.heldout):,} held out",
    ]

    async def body(recorder: Recorder, trainer: TrainerClient, stop: StopRequest) -> None:
        await _with_engines(config, recorder, trainer, stop, text, prompts)

    run_stage(config, "rl", facts, body)


async def _with_engines(
    config: Config,
    recorder: Recorder,
    trainer: TrainerClient,
    stop: StopRequest,
    text: PromptText,
    prompts: PromptSplit,
) -> None:
    pool = RewardPool(
        config.rewards.workers,
        config.rewards.timeout_seconds,
        int(config.rewards.memory_gib * 1024**3),
    )
    fleet = RolloutFleet(...)
    staging = _staging_folder(recorder.folder.path)
    try:
        recorder.view.phase("starting engines", f"{config.rollout.engines} x vLLM")
        await fleet.start()
        session = Session(
            config,
            recorder,
            trainer,
            fleet,
            Rollouts(fleet, pool, text, config.rewards),
            PromptSampler(prompts.train, config.run.seed),
            prompts.heldout,
            staging,
            stop,
        )
        await session.begin()
        await train(session)
    finally:
        await asyncio.gather(fleet.close(), pool.close())
        shutil.rmtree(staging, ignore_errors=True)


def _staging_folder(run_folder: Path) -> Path:
    """Shared memory for weights on their way, named after the run: a restart finds and empties it."""
    name = hashlib.sha256(str(run_folder.resolve()).encode()).hexdigest()[:16]
    folder = SHARED_MEMORY / f"megatron_r1_{name}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder
