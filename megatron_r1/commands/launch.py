"""Start a stage's trainer, open its run folder, run its loop, export, report - and stop cleanly."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import subprocess
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from megatron_r1.config import RESUMABLE, Config, ModelConfig
from megatron_r1.errors import TrainerError
from megatron_r1.evaluation.model_folder import has_newest_export
from megatron_r1.processes import children
from megatron_r1.processes.authentication import RANKS_ENVIRONMENT
from megatron_r1.processes.lifetime import die_with_parent
from megatron_r1.processes.stopping import StopRequest
from megatron_r1.reporting.run_folder import RunFolder
from megatron_r1.supervision.supervisor import Supervisor
from megatron_r1.training.client import TrainerClient
from megatron_r1.training.recorder import Recorder
from megatron_r1.weights.stored.weight_files import weight_files

PORT, WORLD_SIZE = "MEGATRON_R1_PORT", "MEGATRON_R1_WORLD_SIZE"
"""Set for a controller that torchrun's rank 0 started: where its ranks come to, and how many."""

SPANS_HOSTS = "MEGATRON_R1_SPANS_HOSTS"
"""Set for such a controller where the ranks are on more hosts than this."""

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def start_controller(arguments: list[str]) -> tuple[subprocess.Popen, str]:
    """Under torchrun, on rank 0: start the controller beside this rank; its address for all."""
    port = children.free_port()
    os.environ[RANKS_ENVIRONMENT] = secrets.token_hex(32)  # this rank hands it on
    environment = {k: v for k, v in os.environ.items() if k not in TORCHRUN}
    environment |= {PORT: str(port), WORLD_SIZE: os.environ["WORLD_SIZE"]}
    if os.environ.get("LOCAL_WORLD_SIZE", environment[WORLD_SIZE]) != environment[WORLD_SIZE]:
        environment[SPANS_HOSTS] = "1"
    controller = subprocess.Popen(
        [sys.executable, "-m", "megatron_r1", *arguments],
        env=environment,
        preexec_fn=die_with_parent,
    )
    return controller, f"tcp://{os.environ['MASTER_ADDR']}:{port}"


Body = Callable[[Recorder, TrainerClient, StopRequest, Supervisor], Awaitable[None]]
"""Gets the trainer while its ranks are still starting: it awaits `trainer.connect()`."""


def run_stage(
    config: Config,
    name: str,
    facts: Sequence[str],
    body: Body,
    next_commands: Sequence[tuple[str, str]] = (),
) -> None:
    """Run `body` between start and export. Raises what ended it: TrainerError, EngineError,
    ValueError; KeyboardInterrupt when a person or the scheduler asked it to stop."""
    try:
        asyncio.run(_run_stage(config, name, facts, body, next_commands))
    except asyncio.CancelledError:  # the second Ctrl-C
        raise KeyboardInterrupt from None


def _require_weights(model: ModelConfig) -> None:
    """Raises ValueError now for what ranks and engines would find out once they have started."""
    if model.init == "load" and not model.checkpoint:
        try:
            weight_files(Path(model.path))
        except ValueError as error:
            raise ValueError(
                f"model.path: {error}; give a folder with weights, or model.init: random to sft"
            ) from None


async def _run_stage(config, name, facts, body: Body, next_commands) -> None:
    stop = StopRequest()
    stop.listen()
    ranks = int(os.environ.get(WORLD_SIZE, 0))
    config.parallel.check_sizes(ranks or config.parallel.processes)
    with RunFolder(config.run.folder) as folder:
        stop.watch(folder.path)
        title = f"{name} · {folder.path.name}"
        recorder = Recorder(
            folder,
            config,
            may_change=RESUMABLE,
            title=title,
            facts=facts,
        )
        stop.notify = recorder.view.message
        if recorder.state.step >= config.run.steps and has_newest_export(folder.path):
            recorder.view.message(f"{folder.path} is already finished: {folder.hf}")
            recorder.close("nothing to do")
            return
        port = os.environ.get(PORT)
        bind = f"tcp://*:{port}" if port else "tcp://127.0.0.1:*"
        trainer = TrainerClient(config, folder.path / "logs", bind, ranks or None)
        supervisor = Supervisor(config, recorder, trainer, spans_hosts=SPANS_HOSTS in os.environ)

        async def work() -> None:
            await body(recorder, trainer, stop, supervisor)
            await recorder.checkpoints.finish(trainer)
            if recorder.state.step >= config.run.steps:
                recorder.view.phase("exporting", str(folder.hf))
                await trainer.call("export", folder=str(folder.hf))

        outcome = ""
        try:
            if recorder.resumed:
                recorder.view.message(f"continuing after step {recorder.state.step}")
            else:
                _require_weights(config.model)
            if not ranks:
                trainer.launch()
            await supervisor.run(work())
            if recorder.state.step < config.run.steps:
                stop.done()
                raise KeyboardInterrupt
            outcome = "finished"
        except Exception:
            # Whatever ended the run: what the trainer is still writing is worth the wait.
            if trainer.is_usable:
                with contextlib.suppress(TrainerError, ValueError):
                    await recorder.checkpoints.finish(trainer)
            raise
        finally:
            await trainer.close()
            recorder.close(outcome or f"stopped after step {recorder.state.step},")
            if folder.read_metrics():
                _report(folder, title, config.model.path, facts, next_commands)


def _report(
    folder: RunFolder,
    title: str,
    model: str,
    facts: Sequence[str],
    next_commands: Sequence[tuple[str, str]],
) -> None:
    # Imports matplotlib, for which the trainer need not wait at the start.
    from megatron_r1.reporting.report import write_report

    summary = {"model": model, "task": " · ".join(facts[1:])}
    write_report(folder, title=title, facts=summary, next_commands=next_commands)
    print(f"report: {folder.path / 'report.html'}", flush=True)
