"""A training run: imports that begin early, its folder, its trainer, its loop, then export and
report, and a clean stop.

The loop of `rl` is `controller.loop`; that of `sft` and `reward-model`, over a data set of
examples, is `run_supervised`. Imports of vLLM and Megatron-Core begin while the controller reads
the data."""

import asyncio
import contextlib
import json
import math
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Literal, TypeVar

from megatron_r1.base.errors import Cause, TrainerError, UserError
from megatron_r1.base.files import atomic_write
from megatron_r1.base.files.foreign import require_complete, weight_files
from megatron_r1.base.processes import preloaded, timeline
from megatron_r1.base.processes.stopping import StopRequest
from megatron_r1.commands import torchrun
from megatron_r1.commands.torchrun import PORT, SPANS_HOSTS
from megatron_r1.config import RESUMABLE, Config, ModelConfig
from megatron_r1.config.training import learning_rate, warmup_note
from megatron_r1.controller.cpu_memory import cpu_memory
from megatron_r1.controller.supervision.supervisor import Supervisor
from megatron_r1.controller.trainer_calls.client import TrainerClient
from megatron_r1.controller.trainer_calls.packing import check_batches
from megatron_r1.controller.trainer_calls.ranks import MODULE as RANK
from megatron_r1.controller.trainer_calls.ranks import import_environment
from megatron_r1.controller.trainer_calls.recorder import Recorder
from megatron_r1.data.sampler import EpochSampler
from megatron_r1.engines.server import gpu
from megatron_r1.engines.server.recipe import engine_settings
from megatron_r1.engines.server.settings import MODULE as ENGINE
from megatron_r1.engines.server.settings import EngineSettings
from megatron_r1.evaluation.identity import has_newest_export
from megatron_r1.models.hf_config import as_read, num_mtp_layers, read_hf_config
from megatron_r1.models.weights.adapter_table import check_adapters
from megatron_r1.reporting.run_folder import RunFolder
from megatron_r1.trainer.operations import FolderOperations
from megatron_r1.trainer.sample import Sample


def begin_engines(config: Config) -> None:
    """Begin the import of vLLM for engines on this host: four seconds of CPU. The process ends with
    this one, also if no engine is started. Call it once the settings are checked."""
    if config.rollout.placement == "local":
        own = engine_settings(config.rollout)
        replay = config.rl.routing_replay
        settings = EngineSettings(device=gpu.device(), return_routing=replay, **own)
        preloaded.begin(ENGINE, settings.environment())


def begin_trainer() -> None:
    """Begin the import of Megatron-Core, likewise, for ranks that the controller starts on a host
    without GPUs: two seconds of CPU."""
    if torchrun.starts_ranks() and not gpu.is_usable():
        preloaded.begin(RANK, import_environment())


@dataclass(frozen=True)
class TrainingRun:
    """A run in progress: its folder and view, its trainer, the request to stop, its supervision."""

    recorder: Recorder
    trainer: TrainerClient
    stop: StopRequest
    supervisor: Supervisor


Body = Callable[[TrainingRun], Awaitable[None]]
"""Trains. It is called while the trainer's ranks are still starting, and awaits
`trainer.connect()`."""

IMPLEMENTATIONS = "implementations.json"
"""The file in the run's folder that names the implementation of each part of a step."""

OTHERS = {"curation.json": "a sampling", "identity.json": "an evaluation or a sampling"}
"""Files of folders that a training run cannot continue."""

Commands = Sequence[tuple[str, str]]
"""(purpose, command) suggestions for the report."""


def check_trainer(config: Config, verb: str) -> None:
    """Raise UserError where the trainer's ranks do not fit `parallel`, are too many for the batches
    of `verb`, or a target of `model.lora` is not there. Call it before anything starts: in RL the
    trainer itself would fail only after the engines' start and a whole rollout."""
    num_ranks = torchrun.num_ranks(config)
    config.parallel.check_sizes(num_ranks)
    trains_mtp = config.model.mtp == "train"
    if trains_mtp and not num_mtp_layers(read_hf_config(config.model.path, None)):
        raise UserError(
            f"model.mtp: train, but {config.model.path} has no MTP layers; leave it out",
            key="model.mtp",
            cause=Cause.CONFLICT,
        )
    if config.model.lora is not None:
        check_adapters(config, read_hf_config(config.model.path))
    for _, settings in config.phases():
        check_batches(settings, verb, num_ranks)


def run_training(
    config: Config, name: str, facts: Sequence[str], body: Body, next_commands: Commands = ()
) -> None:
    """Run `body`, export the model and write the report.

    name: of the kind of run, for its title. facts: about the run, the model's path first.
    Raises UserError, TrainerError or EngineError as they end the run, KeyboardInterrupt when it was
    asked to stop."""
    for file, what in OTHERS.items():
        if Path(config.run.folder, file).exists():
            raise UserError(
                f"run.folder {config.run.folder} is that of {what}: give the training a folder of "
                "its own",
                key="run.folder",
                cause=Cause.EXISTS,
            )
    try:
        asyncio.run(_run(config, name, facts, body, next_commands))
    except asyncio.CancelledError:  # the second Ctrl-C
        raise KeyboardInterrupt from None


def show_trainer(recorder: Recorder, trainer: TrainerClient) -> None:
    """Print the model's size and which implementation computes each part of a step, and keep the
    latter in the run's folder; once the trainer is connected."""
    parts = trainer.implementations
    recorder.view.message(f"{trainer.num_parameters / 1e6:,.2f}M parameters; in use:")
    for part, kind in parts.items():
        recorder.view.message(f"  {part:20} {kind}")
    path = recorder.folder.path / IMPLEMENTATIONS
    atomic_write(path, json.dumps(parts, indent=1) + "\n")


async def _run(
    config: Config, name: str, facts: Sequence[str], body: Body, next_commands: Commands
) -> None:
    """Lock the folder, start the trainer, and run `body` under supervision; then export. However
    it ends: wait for the checkpoint being written, stop the ranks, write the report."""
    stop = StopRequest()
    stop.listen()
    num_ranks = torchrun.num_ranks(config)
    with RunFolder(config.run.folder) as folder:
        stop.watch(folder.path)
        title = f"{name} · {folder.path.name}"
        recorder = Recorder(folder, config, may_change=RESUMABLE, title=title, facts=facts)
        stop.notify = recorder.view.message
        if recorder.state.step >= config.run.steps and has_newest_export(folder.path):
            recorder.view.message(
                f"{folder.path} is already finished: {folder.hf} has the model after step "
                f"{recorder.state.step}; run.steps: {config.run.steps}, raise it to train on"
            )
            recorder.close("nothing to do")
            return
        num_updates = config.num_policy_updates if name == "rl" else config.run.steps
        if note := warmup_note(config.optimizer, num_updates):
            recorder.view.message(note)
        for sentence in as_read(config.model.path):
            recorder.view.message(sentence)
        port = os.environ.get(PORT)
        bind = f"tcp://*:{port}" if port else "tcp://127.0.0.1:*"
        fitting = _with_microbatch(config, num_ranks, name == "rl", recorder.view.message)
        trainer = TrainerClient(fitting, folder.path / "logs", bind, num_ranks)
        supervisor = Supervisor(config, recorder, trainer, spans_hosts=SPANS_HOSTS in os.environ)
        running = TrainingRun(recorder, trainer, stop, supervisor)
        outcome = ""
        try:
            if not recorder.resumed:
                _require_weights(config.model)
            if port is None:  # no torchrun has started them
                trainer.launch()
            await supervisor.run(_train_and_export(config, running, body))
            stop.done()
            if recorder.state.step < config.run.steps:
                raise KeyboardInterrupt
            outcome = "finished"
        except Exception:
            # After any failure, wait for the checkpoint that the trainer is still writing.
            if trainer.is_usable:
                with contextlib.suppress(TrainerError, UserError):
                    await recorder.checkpoints.finish(trainer)
            raise
        finally:
            await trainer.close()
            recorder.close(outcome or f"stopped after step {recorder.state.step},")
            if folder.read_metrics():
                timeline.reached("controller/roles ended")
                _write_report(folder, title, facts, next_commands)
                timeline.reached("controller/report written")


async def _train_and_export(config: Config, running: TrainingRun, body: Body) -> None:
    """Await `body` and the last checkpoint; export the model if all steps are done."""
    recorder, trainer = running.recorder, running.trainer
    await body(running)
    await recorder.checkpoints.finish(trainer)
    if recorder.state.step < config.run.steps:
        return
    folder = recorder.folder
    recorder.view.phase("exporting", str(folder.hf))
    if config.model.lora is not None:
        await trainer.call(FolderOperations.export_adapter, folder=str(folder.adapter))
    timeline.reached("controller/steps done")
    await trainer.call(FolderOperations.export, folder=str(folder.hf))
    timeline.reached("controller/exported")


def _write_report(
    folder: RunFolder, title: str, facts: Sequence[str], next_commands: Commands
) -> None:
    # Imports matplotlib, for which the trainer need not wait at the start.
    from megatron_r1.reporting.report import headline, write_report

    summary = {"model": facts[0], "task": " · ".join(facts[1:])}
    write_report(folder, title=title, facts=summary, next_commands=next_commands)
    print(f"{headline(folder)}\nreport: {folder.report_path}", flush=True)


def _with_microbatch(
    config: Config, num_ranks: int, has_engines: bool, notify: Callable[[str], object]
) -> Config:
    """Return the recipe with a micro-batch that fits into this host's memory, if the host trains on
    its CPU, and print the memory that the run takes. has_engines: whether engines run as well.

    Raises UserError for a run that does not fit."""
    if gpu.is_usable() or SPANS_HOSTS in os.environ:
        return config
    memory = cpu_memory(config, num_ranks, has_engines=has_engines)
    tokens = memory.microbatch(config.parallel.tokens_per_microbatch)
    notify(memory.describe(tokens))
    return config.with_changes(parallel={"tokens_per_microbatch": tokens})


def _require_weights(model: ModelConfig) -> None:
    """Raise UserError where ranks and engines, once started, would find no weights."""
    if model.init == "load" and not model.checkpoint:
        try:
            weight_files(Path(model.path))
        except UserError as error:
            raise UserError(
                f"model.path: {error}; give a folder with weights, or model.init: random to sft",
                key="model.path",
                cause=error.cause,
            ) from None
        require_complete(Path(model.path))


Item = TypeVar("Item")


@dataclass(frozen=True)
class SupervisedTask(Generic[Item]):
    """A data set, its loss and its evaluation.

    batch_size: items per optimizer step.
    to_samples: tokenizes the items of a batch.
    loss: as "module:function".
    unit: as of `TrainerClient.load`.
    notes: messages about the data and the model, once the trainer has started.
    evaluate: called before the first step, every `eval.every` steps, and after the last."""

    config: Config
    sampler: EpochSampler[Item]
    batch_size: int
    to_samples: Callable[[list[Item]], list[Sample]]
    loss: str
    unit: int = 1
    notes: Callable[[TrainerClient, bool], Sequence[str]] = lambda trainer, resumed: ()
    evaluate: Callable[[Recorder, TrainerClient], Awaitable[None]] | None = None


def with_steps(config: Config, section: Literal["sft", "reward_model"], epoch_size: int) -> Config:
    """Return the configuration with the `run.steps` that the section's `epochs` amounts to; the
    last batch may begin another epoch. Raises UserError where the recipe sets another number."""
    settings = getattr(config, section)
    if settings.epochs is None:
        return config
    # The rounding: 0.1 x 30 must not become 4 batches of one.
    num_examples = round(settings.epochs * epoch_size, 6)
    steps = max(1, math.ceil(num_examples / settings.batch_size))
    if "steps" in config.run.model_fields_set and config.run.steps != steps:
        raise UserError(
            f"{section}.epochs: {settings.epochs:g} epochs of {epoch_size:,} examples are "
            f"{steps:,} batches, and run.steps is {config.run.steps:,}; leave one of them out",
            key=f"{section}.epochs",
            cause=Cause.CONFLICT,
        )
    return config.with_changes(run={"steps": steps})


def run_supervised(
    task: SupervisedTask, title: str, facts: Sequence[str], next_commands: Commands = ()
) -> None:
    """Train for `run.steps` batches. Arguments and errors are those of `run_training`."""
    start = task.sampler.state_dict()

    async def body(running: TrainingRun) -> None:
        recorder, trainer = running.recorder, running.trainer
        recorder.view.phase("starting trainer")
        await trainer.connect()
        show_trainer(recorder, trainer)
        for note in task.notes(trainer, recorder.resumed):
            recorder.view.message(note)

        async def attempt() -> None:
            if recorder.resumed:
                await recorder.load(trainer, reference=False)
            task.sampler.load_state_dict(recorder.state.sampler or start)
            await _train(task, recorder, trainer, running.stop)

        await running.supervisor.with_restarts(attempt)

    run_training(task.config, title, facts, body, next_commands)


async def _train(
    task: SupervisedTask, recorder: Recorder, trainer: TrainerClient, stop: StopRequest
) -> None:
    state, steps = recorder.state, task.config.run.steps
    evaluation, checkpoint = task.config.eval, task.config.checkpoint
    if task.evaluate and not recorder.resumed:
        await task.evaluate(recorder, trainer)
    while state.step < steps:
        recorder.view.phase("train")
        await _step(task, recorder, trainer)
        is_last, is_stopping = state.step == steps, stop.requested
        is_due = evaluation.every and state.step % evaluation.every == 0
        if task.evaluate and (is_last or is_due):
            await task.evaluate(recorder, trainer)
        if is_last or is_stopping or state.step % checkpoint.every == 0:
            await recorder.save(trainer)
        if is_stopping:
            return


async def _step(task: SupervisedTask, recorder: Recorder, trainer: TrainerClient) -> None:
    """Take one optimizer step on the next batch, and record it."""
    state, config = recorder.state, task.config
    batch = task.to_samples(task.sampler.next(task.batch_size))
    start = time.perf_counter()
    state.step += 1
    state.optimizer_step += 1
    rate = learning_rate(config.optimizer, state.step, config.run.steps)
    metrics = await trainer.load([batch], unit=task.unit)
    metrics |= await trainer.update(0, task.loss, None, rate)
    seconds = time.perf_counter() - start
    metrics["trainer/restarts"] = trainer.num_restarts
    metrics |= await recorder.checkpoints.completed(trainer)
    metrics |= {
        "learning_rate": rate,
        "time/train": seconds,
        "time/step": seconds,
        "tokens_per_second": sum(len(sample) for sample in batch) / seconds,
    }
    recorder.step({"step": state.step, **metrics}, [])
    state.sampler = task.sampler.state_dict()
