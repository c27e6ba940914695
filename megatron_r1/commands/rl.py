"""Reinforcement learning: R1-Zero, R1's reasoning stage and its stage for all scenarios. See
docs/stages/, docs/algorithms.md and docs/rewards.md.

The algorithm is `rl.loop.train`. Here the roles of a run are started and joined: engines and
graders (`rollout_run`) beside the trainer (`training_run`), and a session of both."""

import asyncio
from collections.abc import Callable
from pathlib import Path

from megatron_r1.commands import early_imports
from megatron_r1.commands.gpu_placement import engines_share_gpus
from megatron_r1.commands.rl_checks import (
    check_settings,
    ends_with,
    naming_renamed_columns,
    read_questions,
)
from megatron_r1.commands.rl_questions import questions_drawn
from megatron_r1.commands.rollout_run import open_rollouts
from megatron_r1.commands.training_run import TrainingRun, run_training, show_trainer
from megatron_r1.config import Config
from megatron_r1.data.prompts import PromptSplit
from megatron_r1.data.sampler import PromptSampler
from megatron_r1.data.text import PromptText
from megatron_r1.engine import gpu
from megatron_r1.engine.errors import EngineError
from megatron_r1.engine.limits import context_length
from megatron_r1.errors import TrainerLost
from megatron_r1.evaluation.model_folder import require_weights
from megatron_r1.fleet.placement import accepting_hosts, open_pool
from megatron_r1.fleet.rollout_fleet import RolloutFleet
from megatron_r1.processes import timeline
from megatron_r1.processes.imports import without_garbage_collection
from megatron_r1.rl.collector import RolloutCollector
from megatron_r1.rl.heldout import HeldoutEvaluation
from megatron_r1.rl.loop import train
from megatron_r1.rl.policy_engines import PolicyEngines
from megatron_r1.rl.sample_log import SampleLog
from megatron_r1.rl.session import Session
from megatron_r1.rl.step_sampler import StepSampler
from megatron_r1.rl.trainer_passes import TrainerPasses
from megatron_r1.trainer_client.client import TrainerClient
from megatron_r1.training.operations import ModelOperations
from megatron_r1.weight_bridge.bridge import PROBE_TOKENS, weight_bridge

REQUIRED = ("run.folder", "model.path")


def run(config: Config) -> None:
    """Train for `run.steps` rollouts. Raises UserError before any long work starts."""
    check_settings(config)
    timeline.reached("controller/settings checked")
    early_imports.begin_trainer()
    early_imports.begin_engines(config)
    with without_garbage_collection():  # it imports transformers, and sympy for many tasks
        text, prompts = read_questions(config)
    timeline.reached("controller/questions read")
    facts = [
        config.model.path,
        config.data.task or str(config.data.path),
        f"{len(prompts.train):,} questions, {len(prompts.heldout):,} held out",
        *questions_drawn(config, prompts.train),
        ends_with(config, text),
    ]

    async def body(running: TrainingRun) -> None:
        await _run(config, running, text, prompts)

    run_training(config, "rl", facts, body, _next_commands(config))


def dry_run(config: Config) -> None:
    """Sample and grade one batch, print it, and train nothing. Errors as `run`."""
    from megatron_r1.commands.dry_run import show_batch

    check_settings(config)
    require_weights(Path(config.model.path))
    early_imports.begin_engines(config)
    with without_garbage_collection():
        text, prompts = read_questions(config)
    show_batch(config, text, prompts)


async def _run(
    config: Config, running: TrainingRun, text: PromptText, prompts: PromptSplit
) -> None:
    """Start the engines beside the trainer, and train; after the loss of trainer ranks again,
    from the newest checkpoint, with the same engines."""
    recorder, trainer, view = running.recorder, running.trainer, running.recorder.view
    if recorder.state.step >= config.run.steps:
        view.message(f"all {config.run.steps} steps are done; only the export is left: no engines")
        await trainer.connect()
        await recorder.load(trainer, reference=config.uses_reference)
        if recorder.state.step >= config.run.steps:  # else that checkpoint was damaged
            return
    folder, on_one_host = recorder.folder.path, config.push.on_one_host
    async with (
        open_pool(config.rollout, folder, on_one_host, view.message) as hosts,
        open_rollouts(config, recorder, text, hosts) as (collector, log),
    ):
        running.supervisor.watch_rollouts(collector)
        if not config.rl.sample_log:
            await log.prune()  # old samples are not of this run's policies
        # Served rewards of a later phase too: a mistake in them should show now.
        terms = {term: None for _, phase in config.phases() for term in phase.rewards.weights}
        with naming_renamed_columns(config.data.columns):
            await collector.check(terms, prompts.train + prompts.heldout)
        view.phase("starting", f"trainer and {config.rollout.engines} x vLLM")
        if not await running.stop.before(_start(config, trainer, collector)):
            return
        show_trainer(recorder, trainer)

        async def attempt() -> None:
            session = _session(config, running, collector, log, prompts)
            fleet = collector.fleet
            fleet.version = -1  # ranks that went back push earlier versions again
            try:
                try:
                    await session.begin()
                    async with accepting_hosts(fleet, hosts):
                        await train(session)
                    await session.finish()
                finally:
                    await session.close()
            except TrainerLost:
                if config.rollout.colocated and trainer.can_restart:
                    await _free_gpus(trainer, fleet, view.message)
                raise

        await running.supervisor.with_restarts(attempt)


async def _start(config: Config, trainer: TrainerClient, collector: RolloutCollector) -> None:
    """Start the trainer and all engines at once, but engines on the trainer's GPUs after it: an
    engine measures what is free when it starts, and fails if that changes meanwhile."""

    async def start_engines() -> None:
        # version: every engine gets the trainer's weights before it samples.
        await collector.fleet.start(config.model.path, version=-1)
        timeline.reached("controller/engines ready")

    async def start_in_turn() -> None:
        await start_trainer()
        if config.rollout.colocated:
            await trainer.call(ModelOperations.yield_memory)
        await start_engines()

    async def start_trainer() -> None:
        if not trainer.ranks:  # connected before, where only the export was left
            await trainer.connect()
        timeline.reached("controller/trainer ready")

    timeline.reached("controller/rewards checked")
    in_turn = config.rollout.colocated or engines_share_gpus(config)
    starts = [start_in_turn()] if in_turn else [start_trainer(), start_engines()]
    if collector.teacher is not None:
        starts.append(collector.teacher.start(config.teacher.path))
    await asyncio.gather(*starts)


async def _free_gpus(
    trainer: TrainerClient, fleet: RolloutFleet, notify: Callable[[str], None]
) -> None:
    """Free the GPUs' memory for trainer ranks that start again: kill those that are left, then let
    the engines sleep. vLLM's sleep fails where a rank allocates meanwhile: it compares how much of
    the GPU is free before and after (v1/worker/gpu_worker.py)."""
    await asyncio.to_thread(trainer.kill)
    try:
        await fleet.sleep()
    except EngineError as error:
        notify(f"engines did not free their memory: {error}")


def _session(
    config: Config,
    running: TrainingRun,
    collector: RolloutCollector,
    log: SampleLog,
    prompts: PromptSplit,
) -> Session:
    """Return a session that begins at the newest checkpoint."""
    recorder, trainer = running.recorder, running.trainer
    sampler = PromptSampler(prompts.train, config.run.seed)
    room = context_length(config) - PROBE_TOKENS
    first = prompts.train[: config.push.probes]
    probes = [collector.text.encode(prompt.question, prompt.before)[:room] for prompt in first]
    bridge = weight_bridge(config, trainer, collector.fleet, probes)
    ahead = StepSampler(config, collector, sampler, log if config.rl.sample_log else None)
    return Session(
        recorder,
        running.stop,
        PolicyEngines(trainer, bridge, ahead),
        TrainerPasses(config, trainer, recorder.state),
        HeldoutEvaluation(config, collector, prompts.heldout, recorder),
    )


def _next_commands(config: Config) -> list[tuple[str, str]]:
    folder, more = config.run.folder, config.run.steps + config.run.steps // 2
    # On a CPU vLLM takes its share of the machine's memory, and compiling takes minutes.
    on_cpu = "" if gpu.is_usable() else " --enforce-eager --gpu-memory-utilization 0.3"
    return [
        ("the curves, live", f"tensorboard --logdir {folder}"),
        ("train on from here", f"megatron-r1 rl {folder}/config.yaml --run.steps {more}"),
        (
            "serve the model over an OpenAI-compatible API",
            f"python -m vllm.entrypoints.openai.api_server --model {folder}/hf "
            f"--dtype {config.rollout.dtype}{on_cpu}",
        ),
    ]
