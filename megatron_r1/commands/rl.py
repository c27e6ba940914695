"""Reinforcement learning: R1-Zero, R1's reasoning stage and its stage for all scenarios. See
docs/stages/, docs/algorithms.md and docs/rewards.md.

The algorithm is `controller.loop.train`. Here the roles of a run are started and joined: engines
and graders (`rollout_run`) next to the trainer (`training_run`), and a session of both."""

import asyncio
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_r1.base.errors import TrainerLost
from megatron_r1.base.processes import timeline
from megatron_r1.base.processes.imports import without_garbage_collection
from megatron_r1.commands import training_run
from megatron_r1.commands.rl_checks import (
    check_settings,
    ends_with,
    engines_share_gpus,
    naming_renamed_columns,
    questions_drawn,
    read_questions,
)
from megatron_r1.commands.rollout_run import open_rollouts
from megatron_r1.commands.training_run import TrainingRun, run_training, show_trainer
from megatron_r1.config import Config
from megatron_r1.controller.delivery.bridge import PROBE_TOKENS, weight_bridge
from megatron_r1.controller.loop import train
from megatron_r1.controller.rollouts.collector import RolloutCollector
from megatron_r1.controller.rollouts.heldout import HeldoutEvaluation
from megatron_r1.controller.rollouts.sample_log import SampleLog
from megatron_r1.controller.rollouts.step_sampler import StepSampler
from megatron_r1.controller.session import PolicyEngines, Session
from megatron_r1.controller.trainer_passes import TrainerPasses
from megatron_r1.data.prompts import PromptSplit
from megatron_r1.data.sampler import PromptSampler
from megatron_r1.data.text import PromptText
from megatron_r1.engines.fleet.host_pool import HostPool
from megatron_r1.engines.fleet.placement import accepting_hosts, open_pool
from megatron_r1.engines.server import gpu
from megatron_r1.engines.server.errors import EngineError
from megatron_r1.engines.server.recipe import context_length
from megatron_r1.evaluation.identity import require_weights
from megatron_r1.trainer.operations import ModelOperations

REQUIRED = ("run.folder", "model.path")


def run(config: Config) -> None:
    """Train for `run.steps` rollouts. Raises UserError before any long work starts."""
    check_settings(config)
    timeline.reached("controller/settings checked")
    training_run.begin_trainer()
    training_run.begin_engines(config)
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

    body = partial(_train, config, text, prompts)
    run_training(config, "rl", facts, body, _next_commands(config))


def dry_run(config: Config) -> None:
    """Sample and grade one batch, print it, and train nothing. Errors as `run`."""
    from megatron_r1.commands.rollout_run import show_batch

    check_settings(config)
    require_weights(Path(config.model.path))
    training_run.begin_engines(config)
    with without_garbage_collection():
        text, prompts = read_questions(config)
    show_batch(config, text, prompts)


async def _train(
    config: Config, text: PromptText, prompts: PromptSplit, running: TrainingRun
) -> None:
    """Start the engines next to the trainer, and train; after the loss of trainer ranks again,
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
        roles = _Roles(config, running, collector, log, prompts, hosts)
        if not await running.stop.before(roles.start()):
            return
        show_trainer(recorder, trainer)
        await running.supervisor.with_restarts(roles.train)


@dataclass(frozen=True)
class _Roles:
    """The roles of a run: the trainer (`running`), engines and graders (`collector`), with the log
    of their samples, the questions, and the hosts of engines that may join."""

    config: Config
    running: TrainingRun
    collector: RolloutCollector
    log: SampleLog
    prompts: PromptSplit
    hosts: HostPool | None

    async def start(self) -> None:
        """Start the trainer and all engines at once, but engines on the trainer's GPUs after it: an
        engine measures what is free when it starts, and fails if that changes meanwhile."""
        config, teacher = self.config, self.collector.teacher
        timeline.reached("controller/rewards checked")
        in_turn = config.rollout.colocated or engines_share_gpus(config)
        if in_turn:
            starts = [self._start_in_turn()]
        else:
            starts = [self._start_trainer(), self._start_engines()]
        if teacher is not None:
            starts.append(teacher.start(config.teacher.path))
        await asyncio.gather(*starts)

    async def train(self) -> None:
        """Train from the newest checkpoint to the end, or until ranks are lost."""
        session, fleet = self._session(), self.collector.fleet
        fleet.version = -1  # ranks that went back push earlier versions again
        try:
            try:
                await session.begin()
                async with accepting_hosts(fleet, self.hosts):
                    await train(session)
                await session.finish()
            finally:
                await session.close()
        except TrainerLost:
            if self.config.rollout.colocated and self.running.trainer.can_restart:
                await self._free_gpus()
            raise

    def _session(self) -> Session:
        """Return a session that begins at the newest checkpoint."""
        config, prompts, collector = self.config, self.prompts, self.collector
        recorder, trainer = self.running.recorder, self.running.trainer
        room = context_length(config) - PROBE_TOKENS
        first = prompts.train[: config.push.probes]
        probes = [collector.text.encode(prompt.question, prompt.before)[:room] for prompt in first]
        bridge = weight_bridge(config, trainer, collector.fleet, probes)
        log = self.log if config.rl.sample_log else None
        sampler = PromptSampler(prompts.train, config.run.seed)
        return Session(
            recorder,
            self.running.stop,
            PolicyEngines(trainer, bridge, StepSampler(config, collector, sampler, log)),
            TrainerPasses(config, trainer, recorder.state),
            HeldoutEvaluation(config, collector, prompts.heldout, recorder),
        )

    async def _start_in_turn(self) -> None:
        await self._start_trainer()
        if self.config.rollout.colocated:
            await self.running.trainer.call(ModelOperations.yield_memory)
        await self._start_engines()

    async def _start_trainer(self) -> None:
        if not self.running.trainer.ranks:  # connected before, where only the export was left
            await self.running.trainer.connect()
        timeline.reached("controller/trainer ready")

    async def _start_engines(self) -> None:
        # version: every engine gets the trainer's weights before it samples.
        await self.collector.fleet.start(self.config.model.path, version=-1)
        timeline.reached("controller/engines ready")

    async def _free_gpus(self) -> None:
        """Free the GPUs' memory for trainer ranks that start again: kill those that are left, then
        let the engines sleep. vLLM's sleep fails where a rank allocates meanwhile: it compares how
        much of the GPU is free before and after (v1/worker/gpu_worker.py)."""
        await asyncio.to_thread(self.running.trainer.kill)
        try:
            await self.collector.fleet.sleep()
        except EngineError as error:
            self.running.recorder.view.message(f"engines did not free their memory: {error}")


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
