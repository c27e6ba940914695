"""Reinforcement learning: R1-Zero, R1's reasoning stage and its stage for all scenarios. See
docs/stages/, docs/algorithms.md and docs/rewards.md.

The algorithm is `controller.loop.train_policy`. Here the roles of a run are started: engines and
graders (`rollout_services`) next to the trainer (`training_run`)."""

import asyncio
from pathlib import Path

from megatron_r1.base.errors import TrainerLost
from megatron_r1.base.processes import timeline
from megatron_r1.base.processes.process_memory import without_garbage_collection
from megatron_r1.base.processes.stopping import run_until_stopped
from megatron_r1.commands.parts.preloads import preload_megatron, preload_vllm
from megatron_r1.commands.parts.trained_model import next_commands
from megatron_r1.commands.parts.training_run import TrainingRun, show_trainer, training_run
from megatron_r1.commands.rl_checks import check_rl_settings, engines_share_gpus
from megatron_r1.commands.rl_prompts import read_prompts
from megatron_r1.commands.rollout_services import RolloutServices, open_rollout_services
from megatron_r1.commands.run_facts import describe_kind_weights, describe_teachers, run_facts
from megatron_r1.config import Config
from megatron_r1.controller.loop import train_policy
from megatron_r1.controller.policy_engines import PolicyEngines
from megatron_r1.controller.policy_trainer import PolicyTrainer
from megatron_r1.controller.push.prober import PROBE_TOKENS
from megatron_r1.controller.push.pusher import create_pusher
from megatron_r1.controller.rl_run import RLRun
from megatron_r1.controller.rollouts.collector import RolloutCollector
from megatron_r1.controller.rollouts.heldout import HeldoutEvaluation
from megatron_r1.controller.rollouts.step_sampler import StepSampler
from megatron_r1.controller.trainer_calls.client import TrainerClient
from megatron_r1.data.prompt_split import PromptSplit
from megatron_r1.data.prompt_tokenizer import PromptTokenizer
from megatron_r1.data.sampler import PromptSampler
from megatron_r1.engines.fleet.engine_fleet import EngineFleet
from megatron_r1.engines.fleet.joining_hosts import accepting_hosts
from megatron_r1.engines.server.model_config import max_model_len
from megatron_r1.evaluation.model_folder import require_weights
from megatron_r1.trainer.operations import ModelOperations

REQUIRED_KEYS = ("run.folder", "model.path")


def run(config: Config) -> None:
    """Train for `run.steps` rollouts.

    Raises:
        UserError: a mistake in the recipe or its data, before any long work starts.
    """
    check_rl_settings(config)
    timeline.mark("controller/settings checked")
    preload_megatron()
    preload_vllm(config)
    with without_garbage_collection():  # it imports transformers, and sympy for many tasks
        tokenizer, prompts = read_prompts(config)
    timeline.mark("controller/questions read")
    run_until_stopped(_train_with_restarts(config, tokenizer, prompts))


async def _train_with_restarts(
    config: Config, tokenizer: PromptTokenizer, prompts: PromptSplit
) -> None:
    """Start the engines next to the trainer, and train; after the loss of trainer ranks again,
    from the newest checkpoint, with the same engines."""
    facts = run_facts(config, tokenizer, prompts)
    async with training_run(config, "rl", facts, next_commands(config)) as training:
        if training is None or await training.has_all_steps(config):
            return
        async with open_rollout_services(config, training.recorder, tokenizer) as rollout_services:
            training.supervisor.watch_rollouts(rollout_services.collector)
            await rollout_services.check(config, prompts)
            timeline.mark("controller/rewards checked")
            starting = f"trainer and {config.rollout.engines} x vLLM"
            training.recorder.view.show_phase("starting", starting)
            start = _start_roles(config, training.trainer, rollout_services.collector)
            if not await training.stop.finished_before_stop(start):
                return
            show_trainer(training.recorder, training.trainer)
            while True:
                rl_run = _make_rl_run(config, training, rollout_services, prompts)
                joining = accepting_hosts(rollout_services.collector.fleet, rollout_services.hosts)
                try:
                    async with rl_run.open(), joining:
                        await train_policy(rl_run)  # the algorithm
                    return
                except TrainerLost as lost:
                    await training.supervisor.restart_trainer(lost)


async def _start_roles(config: Config, trainer: TrainerClient, collector: RolloutCollector) -> None:
    """Start the trainer and all engines at once, but engines on the trainer's GPUs after it. An
    engine measures what is free when it starts, and fails if that changes meanwhile."""
    fleet, teachers = collector.fleet, collector.teachers
    if config.rollout.colocated or engines_share_gpus(config):
        starts = [_start_in_turn(config, trainer, fleet)]
    else:
        starts = [_start_trainer(trainer), _start_engines(config, fleet)]
    if teachers is not None:
        starts.append(teachers.start())
    await asyncio.gather(*starts)


async def _start_in_turn(config: Config, trainer: TrainerClient, fleet: EngineFleet) -> None:
    await _start_trainer(trainer)
    if config.rollout.colocated:
        await trainer.call(ModelOperations.free_memory, free_parameters=True)
    await _start_engines(config, fleet)


async def _start_trainer(trainer: TrainerClient) -> None:
    if not trainer.ranks:  # connected before, where only the export was left
        await trainer.connect()
    timeline.mark("controller/trainer ready")


async def _start_engines(config: Config, fleet: EngineFleet) -> None:
    # -1: no policy version yet; each engine gets the trainer's weights before it samples.
    await fleet.start(config.model.path, policy_version=-1)
    timeline.mark("controller/engines ready")


def _make_rl_run(
    config: Config, training: TrainingRun, rollout_services: RolloutServices, prompts: PromptSplit
) -> RLRun:
    """Return the run, which begins at the newest checkpoint."""
    collector, trainer, recorder = rollout_services.collector, training.trainer, training.recorder
    collector.fleet.forget_policy_version()  # ranks that went back push earlier ones again
    longest = max_model_len(config) - PROBE_TOKENS
    first = prompts.train[: config.push.probes]
    probes = [
        collector.tokenizer.encode(prompt.question, prompt.messages_before)[:longest]
        for prompt in first
    ]
    pusher = create_pusher(config, trainer, collector.fleet, probes)
    prompt_sampler = PromptSampler(prompts.train, config.run.seed)
    step_sampler = StepSampler(config, collector, prompt_sampler, rollout_services.sample_log)
    return RLRun(
        recorder,
        training.stop,
        collector,
        PolicyEngines(trainer, pusher, step_sampler),
        PolicyTrainer(config, trainer, recorder.state),
        HeldoutEvaluation(config, collector, prompts.heldout, recorder),
    )


def dry_run(config: Config) -> None:
    """Sample and grade one batch, print it, and train nothing.

    Raises:
        UserError: a mistake in the recipe or its data.
    """
    from megatron_r1.commands.dry_run import show_batch

    check_rl_settings(config)
    require_weights(Path(config.model.path))
    preload_vllm(config)
    with without_garbage_collection():
        tokenizer, prompts = read_prompts(config)
    for line in (
        *describe_kind_weights(config, prompts.train),
        *describe_teachers(config, prompts.train),
    ):
        print(line)
    show_batch(config, tokenizer, prompts)
