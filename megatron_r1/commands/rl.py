"""Reinforcement learning: R1-Zero, R1's reasoning stage and its stage for all scenarios. See
docs/stages/, docs/algorithms.md and docs/rewards.md."""

import asyncio
import json
import sys
from collections import Counter
from collections.abc import Coroutine
from functools import partial
from typing import Any

from megatron_r1.agents.rows import rows_of
from megatron_r1.commands import torchrun
from megatron_r1.commands.training_run import check_trainer, run_training, show_trainer
from megatron_r1.config import Config
from megatron_r1.data.prompts import Prompt, PromptSplit
from megatron_r1.data.sampler import PromptSampler, draw_shares
from megatron_r1.data.text import PromptText
from megatron_r1.engine import gpu
from megatron_r1.engine.from_config import engine_settings, fleet_settings
from megatron_r1.engine.limits import check_engines, context_length
from megatron_r1.errors import TrainerLost, UserError
from megatron_r1.fleet.hosts.pool import HostPool
from megatron_r1.fleet.placement import (
    accepting_hosts,
    check_room,
    hosts_address,
    open_pool,
    server_maker,
)
from megatron_r1.fleet.rollout_fleet import RolloutFleet
from megatron_r1.models import read_hf_config
from megatron_r1.models.routing_shape import routing_shape
from megatron_r1.processes.stopping import StopRequest
from megatron_r1.reporting.wording import percent
from megatron_r1.rewards.runtime.pool import RewardPool
from megatron_r1.rl import algorithms
from megatron_r1.rl.collector import RolloutCollector
from megatron_r1.rl.environments import check_environment, player_of
from megatron_r1.rl.heldout import HeldoutEvaluation
from megatron_r1.rl.loop import train
from megatron_r1.rl.sample_log import SampleLog
from megatron_r1.rl.session import Session
from megatron_r1.rl.step_sampler import StepSampler
from megatron_r1.rl.teacher import check_teacher, teacher_fleet
from megatron_r1.rl.trainer_passes import TrainerPasses
from megatron_r1.supervision.supervisor import Supervisor
from megatron_r1.training.client import TrainerClient
from megatron_r1.training.recorder import Recorder
from megatron_r1.weight_sync.bridge import weight_bridge
from megatron_r1.weight_sync.plan.checks import check_pushes
from megatron_r1.weight_sync.probes import PROBE_TOKENS
from megatron_r1.weights.stored import fp8

REQUIRED = ("run.folder", "model.path")


def run(config: Config) -> None:
    """Train for `run.steps` rollouts. Raises UserError before any long work starts."""
    text, prompts = prepare(config)
    drawn = questions_drawn(config, prompts.train)
    facts = [
        config.model.path,
        config.data.task or str(config.data.path),
        f"{len(prompts.train):,} questions, {len(prompts.heldout):,} held out",
        *drawn,
    ]

    async def body(
        recorder: Recorder, trainer: TrainerClient, stop: StopRequest, supervisor: Supervisor
    ) -> None:
        place = (config.rollout, recorder.folder.path, config.push.on_one_host)
        async with open_pool(*place, recorder.view.message) as hosts:
            roles = (recorder, trainer, stop, supervisor)
            await _with_engines(config, *roles, text, prompts, hosts)

    run_training(config, "rl", facts, body, _next_commands(config))


def dry_run(config: Config) -> None:
    """Sample and grade one batch, print it, and train nothing. Errors as `run`."""
    from megatron_r1.commands.dry_run import show_batch

    show_batch(config, *prepare(config))


def prepare(config: Config) -> tuple[PromptText, PromptSplit]:
    """Check all that can be checked before anything starts; return the tokenizer with its template,
    and the questions. Raises UserError."""
    if config.model.init != "load":
        raise UserError("model.init: rl needs a model to start from; make one with sft, then load")
    config.model.require_language_head()
    algorithms.find(config.rl.algorithm)
    check_trainer(config, "rl")
    hf = read_hf_config(config.model.path)
    if config.rl.routing_replay:
        routing_shape(hf)
    check_engines(config, hf)
    check_room(config.rollout)
    check_pushes(config, hf, torchrun.num_ranks(config))
    transport = config.push.transport
    if transport in ("cuda_ipc", "nccl") and not gpu.is_usable():
        raise UserError(
            f"push.transport: {transport} moves memory of GPUs, and there is none here; set shm, "
            "or gloo where engines are on other hosts"
        )
    if config.rollout.colocated and config.rollout.gpu_memory is None and gpu.is_usable():
        raise UserError(
            "rollout.gpu_memory is not set, and vLLM takes 0.92 of a GPU, which rollout.colocated "
            "shares with a trainer rank; set what the rank leaves: tools/plan prints the most"
        )
    check_teacher(config)
    if config.rollout.placement == "hosts":
        hosts_address(config.rollout)
    text = PromptText(config.model.path, config.data.template)
    check_environment(config, text)
    rows = config.data.model_dump(exclude={"template"})
    prompts = rows_of(config.agents, **rows)
    prompts = prompts_that_fit(prompts, text, context_length(config))
    if not prompts.heldout:
        print(
            "no held-out questions, so nothing will be evaluated: raise data.heldout_fraction or "
            "give data.heldout_path",
            file=sys.stderr,
        )
    return text, prompts


def prompts_that_fit(prompts: PromptSplit, text: PromptText, room: int) -> PromptSplit:
    """Return the prompts that an engine has room for, and print how many are left out. Raises
    UserError where none is left to train on."""
    train = [prompt for prompt in prompts.train if text.fits(prompt.question, room)]
    heldout = [prompt for prompt in prompts.heldout if text.fits(prompt.question, room)]
    left_out = len(prompts.train) - len(train), len(prompts.heldout) - len(heldout)
    if any(left_out):
        note = (
            f"{left_out[0]:,} questions and {left_out[1]:,} held-out ones are longer than the "
            f"{room:,} tokens an engine has room for, and left out; rollout.max_model_len, or the "
            "model's own limit, is that room"
        )
        if not train:
            raise UserError(f"no question is left to train on: {note}")
        print(note, file=sys.stderr)
    return PromptSplit(train, heldout)


def questions_drawn(config: Config, prompts: list[Prompt]) -> list[str]:
    """Return a line about each part of the run that draws kinds of questions by weight. Raises
    UserError as `draw_shares`, for any part."""
    lines = []
    counts = Counter(prompt.kind for prompt in prompts)
    for step, phase in config.phases():
        try:
            shares = draw_shares(prompts, phase.rl.kind_weights)
        except UserError as error:
            raise UserError(f"{error}, from step {step}") from None
        sizes = {kind: shares[kind] * count for kind, count in counts.most_common()}
        parts = (f"{percent(size / sum(sizes.values()))} {kind}" for kind, size in sizes.items())
        lines.append(f"from step {step}: {', '.join(parts)}")
    by_weight = any(phase.rl.kind_weights for _, phase in config.phases())
    return lines if by_weight else []


def _next_commands(config: Config) -> list[tuple[str, str]]:
    folder, more = config.run.folder, config.run.steps + config.run.steps // 2
    return [
        ("the curves, live", f"tensorboard --logdir {folder}"),
        ("train on from here", f"megatron-r1 rl {folder}/config.yaml --run.steps {more}"),
        (
            "serve the model over an OpenAI-compatible API",
            f"python -m vllm.entrypoints.openai.api_server --model {folder}/hf --dtype float32 "
            "--enforce-eager --gpu-memory-utilization 0.3",
        ),
    ]


async def _with_engines(
    config: Config,
    recorder: Recorder,
    trainer: TrainerClient,
    stop: StopRequest,
    supervisor: Supervisor,
    text: PromptText,
    prompts: PromptSplit,
    hosts: HostPool | None,
) -> None:
    """Start the engines beside the trainer, and train; after the loss of trainer ranks again,
    from the newest checkpoint, with the same engines."""
    rewards, notify = config.rewards, recorder.view.message
    pool = RewardPool(rewards.workers, rewards.timeout_seconds, rewards.memory_bytes)
    logs = recorder.folder.path / "logs"
    fleet = _fleet(config, recorder, hosts)
    teacher = teacher_fleet(config, logs, notify) if config.teacher.path else None
    player = player_of(config, text)
    collector = RolloutCollector(fleet, pool, text, config.rewards, teacher, player)
    log = SampleLog(recorder.folder.sample_log, notify)
    supervisor.watch_rollouts(collector)
    try:
        if not config.rl.sample_log:
            await log.prune()  # old samples are not of this run's policies
        terms = {term: None for _, phase in config.phases() for term in phase.rewards.weights}
        # Served rewards of a later phase too: a mistake in them should show now.
        await collector.check(terms, prompts.train + prompts.heldout)
        recorder.view.phase("starting", f"trainer and {config.rollout.engines} x vLLM")
        starts = _starts(config, trainer, fleet)
        if teacher is not None:
            starts.append(teacher.start(config.teacher.path))
        if not await stop.before(asyncio.gather(*starts)):
            return
        show_trainer(recorder, trainer)

        async def attempt() -> None:
            session = _session(config, recorder, trainer, stop, collector, log, prompts)
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
                if config.rollout.colocated and fleet.awake.is_set():
                    await fleet.sleep()  # the ranks that start again need the GPUs' memory
                raise

        await supervisor.with_restarts(attempt)
    finally:
        fleets = [fleet, teacher] if teacher is not None else [fleet]
        closing = collector.close(), pool.close(), log.close()
        await asyncio.gather(*(each.close() for each in fleets), *closing)


def _starts(
    config: Config, trainer: TrainerClient, fleet: RolloutFleet
) -> list[Coroutine[Any, Any, None]]:
    """Return the starts of trainer and engines: both at once, unless they share GPUs."""
    # version: every engine gets the trainer's weights before it samples.
    start_engines = partial(fleet.start, config.model.path, version=-1)
    if not config.rollout.colocated:
        return [trainer.connect(), start_engines()]

    async def start_in_turn() -> None:
        await trainer.connect()
        await trainer.call("yield_memory")  # an engine measures what is free when it starts
        await start_engines()

    return [start_in_turn()]


def _session(
    config: Config,
    recorder: Recorder,
    trainer: TrainerClient,
    stop: StopRequest,
    collector: RolloutCollector,
    log: SampleLog,
    prompts: PromptSplit,
) -> Session:
    """Return a session that begins at the newest checkpoint."""
    sampler = PromptSampler(prompts.train, config.run.seed)
    room = context_length(config) - PROBE_TOKENS
    first = prompts.train[: config.push.probes]
    probes = [collector.text.encode(prompt.question)[:room] for prompt in first]
    bridge = weight_bridge(config, trainer, collector.fleet, probes)
    return Session(
        recorder,
        stop,
        StepSampler(config, collector, sampler, log if config.rl.sample_log else None),
        TrainerPasses(config, trainer, bridge, recorder.state),
        HeldoutEvaluation(config, collector, prompts.heldout, recorder),
    )


def _fleet(config: Config, recorder: Recorder, hosts: HostPool | None) -> RolloutFleet:
    rollout = config.rollout
    return RolloutFleet(
        rollout.engines,
        recorder.folder.path / "logs",
        notify=recorder.view.message,
        make_server=server_maker(hosts),
        weight_transfer_backend=f"megatron_r1_{config.push.transport}",
        device=gpu.device(),
        sleeps=rollout.colocated,
        max_model_len=context_length(config),
        # A run that continues must not draw the numbers of its beginning again.
        seed=config.run.seed * 1_000_003 + recorder.state.step,
        return_routing=config.rl.routing_replay,
        extra_args=_model_as_pushed(config),
        **fleet_settings(rollout),
        **engine_settings(rollout),
    )


def _model_as_pushed(config: Config) -> list[str]:
    """Return engine arguments for a model whose weights are pushed: the folder's weights are not
    read, and `push.fp8` alone decides whether weights are FP8."""
    arguments = ["--load-format", "dummy"]
    if config.push.fp8 or "quantization_config" in read_hf_config(config.model.path):
        form = {"quantization_config": fp8.CONFIG if config.push.fp8 else None}
        arguments += ["--hf-overrides", json.dumps(form)]
    return arguments
