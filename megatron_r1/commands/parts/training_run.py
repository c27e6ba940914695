"""A training run: its folder and its trainer, then export and report, and a clean stop.

Within `training_run` runs a loop: that of `rl` is `controller.loop`, that of `sft` and
`reward-model` is `supervised_training`."""

import contextlib
import json
import os
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_r1.base.errors import Cause, TrainerError, UserError
from megatron_r1.base.files import atomic_write
from megatron_r1.base.processes import timeline
from megatron_r1.base.processes.stopping import StopRequest
from megatron_r1.commands.parts import torchrun
from megatron_r1.commands.parts.cpu_memory import cpu_memory
from megatron_r1.commands.parts.torchrun import PORT, SPANS_NODES
from megatron_r1.commands.parts.trainer_checks import check_weights
from megatron_r1.config import RESUMABLE, Config
from megatron_r1.config.optimizer import warmup_note
from megatron_r1.controller.run_recorder import RunRecorder
from megatron_r1.controller.supervision.supervisor import Supervisor
from megatron_r1.controller.trainer_calls.client import TrainerClient
from megatron_r1.engines.server import gpu
from megatron_r1.evaluation.model_folder import has_newest_export
from megatron_r1.models.hf_config_file import describe_config_changes
from megatron_r1.reporting.run_folder import RunFolder
from megatron_r1.trainer.operations import CheckpointOperations

IMPLEMENTATIONS = "implementations.json"
"""The file in the run's folder that names the implementation of each part of a step."""
Commands = Sequence[tuple[str, str]]
"""(purpose, command) suggestions for the report."""
NOT_TRAINING = {
    "sample.json": "a sampling",
    "curation.json": "a sampling",  # up to 0.2
    "identity.json": "an evaluation or a sampling",
}
"""Files of folders that a training run cannot continue."""


@dataclass(frozen=True)
class TrainingRun:
    """A run in progress: its folder and view, its trainer, the request to stop, its supervision."""

    recorder: RunRecorder
    trainer: TrainerClient
    stop: StopRequest
    supervisor: Supervisor

    async def has_all_steps(self, config: Config) -> bool:
        """Return whether all steps are done and only the export is left, which needs no engines.
        The trainer then has the weights after the last step."""
        if self.recorder.state.step < config.run.steps:
            return False
        self.recorder.view.show_message(
            f"all {config.run.steps} steps are done; only the export is left: no engines"
        )
        await self.trainer.connect()
        await self.recorder.load(self.trainer, with_reference=config.uses_reference)
        return self.recorder.state.step >= config.run.steps  # else that checkpoint was damaged


@contextlib.asynccontextmanager
async def training_run(
    config: Config, name: str, facts: Sequence[str], next_commands: Commands = ()
) -> AsyncIterator[TrainingRun | None]:
    """Lock the run's folder, start the trainer, and supervise the block, which trains; then export.
    However it ends: wait for the checkpoint being written, stop the ranks, write the report.

    Yields the run while its ranks are still starting: the block awaits `TrainerClient.connect`.
    Yields None where the run is finished and exported: nothing is left to do.

    Args:
        config: the run's settings.
        name: the kind of run, for its title. "rl" has engines as well, whose memory counts, and
            the number of its updates is that of the policy's; others have one a step.
        facts: short phrases that describe the run in the terminal and in its report, such as its
            questions; the first is the model's path.
        next_commands: pairs of a purpose and a command to try next, which the report lists.

    Raises:
        UserError: a setting, file or model cannot be used.
        TrainerError: the trainer ranks failed for good.
        EngineError: the engines failed for good.
        HangError: nothing moved for `run.hang_seconds`.
        KeyboardInterrupt: the run was asked to stop before its last step.
    """
    refuse_foreign_folder(config)
    stop = StopRequest()
    stop.listen()
    with RunFolder(config.run.folder) as folder:
        stop.watch(folder.path)
        title = f"{name} · {folder.path.name}"
        recorder = RunRecorder(folder, config, may_change=RESUMABLE, title=title, facts=facts)
        stop.notify = recorder.view.show_message
        if recorder.state.step >= config.run.steps and has_newest_export(folder.path):
            recorder.view.show_message(
                f"{folder.path} is already finished: {folder.hf_folder} has the model after step "
                f"{recorder.state.step}; run.steps: {config.run.steps}, raise it to train on"
            )
            recorder.close("nothing to do")
            yield None
            return
        trainer = _make_trainer_client(config, name, recorder)
        supervisor = Supervisor(config, recorder, trainer, spans_nodes=SPANS_NODES in os.environ)
        outcome = ""
        try:
            if not recorder.is_resumed:
                check_weights(config.model)
            if PORT not in os.environ:  # no torchrun has started them
                trainer.launch()
            async with supervisor.watching():
                yield TrainingRun(recorder, trainer, stop, supervisor)
                await recorder.checkpoints.finish(trainer)
                if recorder.state.step >= config.run.steps:
                    await _export_model(config, recorder, trainer)
            stop.clear()
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
                timeline.mark("controller/roles ended")
                _write_report(folder, title, facts, next_commands)
                timeline.mark("controller/report written")


def show_trainer(recorder: RunRecorder, trainer: TrainerClient) -> None:
    """Print the model's size and which implementation computes each part of a step, and keep the
    latter in the run's folder; once the trainer is connected."""
    parts = trainer.implementations
    recorder.view.show_message(f"{trainer.num_parameters / 1e6:,.2f}M parameters; in use:")
    for part, kind in parts.items():
        recorder.view.show_message(f"  {part:20} {kind}")
    path = recorder.folder.path / IMPLEMENTATIONS
    atomic_write(path, json.dumps(parts, indent=1) + "\n")


def _make_trainer_client(config: Config, name: str, recorder: RunRecorder) -> TrainerClient:
    """Return the client of the trainer ranks without starting them. Before, show notes on the
    warm-up and the model's config.json, and on a CPU the memory that the run takes.

    Raises:
        UserError: the run does not fit into memory.
    """
    world_size, notify = torchrun.world_size(config), recorder.view.show_message
    num_updates = config.num_policy_updates if name == "rl" else config.run.steps
    if note := warmup_note(config.optimizer, num_updates):
        notify(note)
    for sentence in describe_config_changes(config.model.path):
        notify(sentence)
    port = os.environ.get(PORT)
    bind = f"tcp://*:{port}" if port else "tcp://127.0.0.1:*"
    fitting = _with_microbatch(config, world_size, name == "rl", notify)
    return TrainerClient(fitting, recorder.folder.path / "logs", bind, world_size)


async def _export_model(config: Config, recorder: RunRecorder, trainer: TrainerClient) -> None:
    """Export the model, after the last step."""
    folder = recorder.folder
    recorder.view.show_phase("exporting", str(folder.hf_folder))
    if config.model.lora is not None:
        await trainer.call(CheckpointOperations.export_adapter, folder=str(folder.adapter_folder))
    timeline.mark("controller/steps done")
    await trainer.call(CheckpointOperations.export, folder=str(folder.hf_folder))
    timeline.mark("controller/exported")


def _write_report(
    folder: RunFolder, title: str, facts: Sequence[str], next_commands: Commands
) -> None:
    # Imports matplotlib, for which the trainer need not wait at the start.
    from megatron_r1.reporting.run_report import run_headline, write_run_report

    summary = {"model": facts[0], "task": " · ".join(facts[1:])}
    write_run_report(folder, title=title, facts=summary, next_commands=next_commands)
    print(f"{run_headline(folder)}\nreport: {folder.report_path}", flush=True)


def _with_microbatch(
    config: Config, world_size: int, has_engines: bool, notify: Callable[[str], object]
) -> Config:
    """Return the recipe with a micro-batch that fits into this host's memory, if the host trains on
    its CPU, and print the memory that the run takes.

    Args:
        config: the recipe.
        world_size: trainer ranks on this host.
        has_engines: whether engines run as well.
        notify: prints a line.

    Raises:
        UserError: the run does not fit."""
    if gpu.is_usable() or SPANS_NODES in os.environ:
        return config
    memory = cpu_memory(config, world_size, has_engines=has_engines)
    tokens = memory.microbatch_tokens(config.parallel.tokens_per_microbatch)
    notify(memory.describe(tokens))
    return config.with_changes(parallel={"tokens_per_microbatch": tokens})


def refuse_foreign_folder(config: Config) -> None:
    """Refuse to train in a folder that belongs to a sampling or an evaluation.

    Args:
        config: the recipe, whose `run.folder` is checked."""
    for file, owner in NOT_TRAINING.items():
        if Path(config.run.folder, file).exists():
            raise UserError(
                f"run.folder {config.run.folder} is that of {owner}: give the training a folder "
                "of its own",
                key="run.folder",
                cause=Cause.EXISTS,
            )
