"""The run of one stage to its end: its recipe, the servers of its models, its command."""

import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from megatron_r1.base.errors import RunError, UserError
from megatron_r1.base.files import atomic_write
from megatron_r1.base.processes import stopping
from megatron_r1.base.processes.log_excerpts import excerpt_log
from megatron_r1.config.yaml_text import dump_yaml
from megatron_r1.pipeline import function_stage, manifest, serving
from megatron_r1.pipeline.child import StageProcess, describe_status
from megatron_r1.pipeline.results import read_results
from megatron_r1.pipeline.stages import PipelinePlan, PipelineStage
from megatron_r1.reporting.folder_lock import is_locked

POLL_SECONDS = 0.1
LOCK_SECONDS = 30.0
"""Time that processes of a killed pipeline have to leave a stage's folder: a choice."""
STOP_STATUS = 130
"""The exit status of a verb that was asked to stop (`commands.cli.main`)."""
LAST_OUTPUTS = {
    "sft": "hf",
    "rl": "hf",
    "reward-model": "hf",
    "sample": "sample.json",
    "eval": "eval.json",
}
"""The output that each verb writes last."""


class StopSignals:
    """Counts Ctrl-C and SIGTERM within a `with` block, so that running stages can end in order."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> Self:
        numbers = (signal.SIGINT, signal.SIGTERM)
        self._before = {number: signal.signal(number, self._on_signal) for number in numbers}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def raise_if_stopped(self) -> None:
        """Raise KeyboardInterrupt if a signal has come."""
        if self.count:
            raise KeyboardInterrupt

    def _on_signal(self, *_: object) -> None:
        self.count += 1


@dataclass(frozen=True)
class Runner:
    """Runs stages of one plan.

    Attributes:
        plan: the stages of one seed.
        signals: whether a stop was asked for.
        show: prints a line.
        prefix: put before every line of a command's output, where other commands run at the same
            time; then no command gets the terminal for its live view."""

    plan: PipelinePlan
    signals: StopSignals
    show: Callable[[str], None]
    prefix: str = ""

    def run(self, stage: PipelineStage, upstream: tuple[str, ...], referenced: set[str]) -> None:
        """Run `stage` to its end.

        Args:
            stage: the pipeline stage.
            upstream: the names of the stages that it needs.
            referenced: outputs that other stages refer to.

        Raises:
            RunError: the stage ends without being done; it continues when it is run again.
            KeyboardInterrupt: a signal asked to stop; the stage continues when it is run again.
        """
        folder = self.plan.folder_of(stage.name)
        self._wait_for_folder(folder)
        self._clear_attempt(stage, folder)
        log = self.plan.log_of(stage.name)
        last_output = log.stat().st_mtime if log.is_file() else None
        manifest.record_begin(self.plan, stage, upstream, last_output)
        try:
            command = self._run_command(stage, folder)
            _check_outputs(stage, folder, referenced)
        except (RunError, KeyboardInterrupt) as error:
            manifest.end_attempt(folder, str(error) or None)
            raise
        manifest.record_finish(self.plan, stage, upstream, command)

    def _wait_for_folder(self, folder: Path) -> None:
        """Wait until processes of a killed pipeline are gone."""
        deadline = time.monotonic() + LOCK_SECONDS
        if is_locked(folder):
            self.show(f"waiting for the process that still works in {folder}")
        while is_locked(folder) and time.monotonic() < deadline:
            self.signals.raise_if_stopped()
            time.sleep(POLL_SECONDS)
        if is_locked(folder):
            raise RunError(
                f"a process of an earlier start still works in {folder}, on this machine or, with "
                "a launch, on another: wait for it, or end it (kill, scancel)"
            )

    def _clear_attempt(self, stage: PipelineStage, folder: Path) -> None:
        """Remove the files of an attempt that cannot be continued."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / stopping.STOP_FILE).unlink(missing_ok=True)
        if stage.is_function or not manifest.has_outputs(folder):
            for path in folder.iterdir():
                if path.name == manifest.BEGUN_FILE:
                    continue
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()

    def _run_command(self, stage: PipelineStage, folder: Path) -> list[str]:
        """Serve the stage's models, run its command, and return that."""
        configs = {name: self.plan.server(server) for name, server in stage.config.serve.items()}
        earlier_ports = (manifest.read_record(folder, manifest.BEGUN_FILE) or {})["ports"]
        ports = serving.choose_ports(configs, earlier_ports)
        manifest.keep_ports(folder, ports)
        logs = {name: self.plan.log_of(stage.name, name) for name in configs}
        if configs:
            self.show(f"serving {', '.join(configs)} for {stage.name}")
        with serving.serve_models(configs, ports, logs, self.signals.raise_if_stopped) as servers:
            urls = {server.name: server.url for server in servers}
            command = write_recipe(self.plan, stage, urls)
            launch = self.plan.resolve(stage.config.launch, urls)
            log = self.plan.log_of(stage.name)
            child = StageProcess(command, log, launch=launch, prefix="  " + self.prefix)
            try:
                self._wait_for_child(child, stage, folder, servers)
            finally:
                child.stop()
        return [*shlex.split(launch), *command]

    def _wait_for_child(
        self,
        child: StageProcess,
        stage: PipelineStage,
        folder: Path,
        servers: list[serving.StageServer],
    ) -> None:
        num_signals = 0
        while (status := child.wait(POLL_SECONDS)) is None:
            for server in servers:
                server.check()
            if self.signals.count > num_signals:
                num_signals = self.signals.count
                self._request_stop(child, stage, folder)
        (folder / stopping.STOP_FILE).unlink(missing_ok=True)
        if status == 0:
            return
        if num_signals or status == STOP_STATUS:
            raise KeyboardInterrupt
        raise RunError(
            f"{describe_status(status)}; from {child.log}:\n{excerpt_log(child.output())}"
        )

    def _request_stop(self, child: StageProcess, stage: PipelineStage, folder: Path) -> None:
        if self.signals.count == 1:
            self.show(f"stopping {stage.name} when its step is done; once more ends it at once")
        if self.signals.count == 1 and stage.config.launch:
            # A launcher that is terminated may leave its job running; the job polls for this file.
            (folder / stopping.STOP_FILE).touch()
        elif self.signals.count <= 2:
            child.terminate()
        else:
            child.kill()


def write_recipe(plan: PipelinePlan, stage: PipelineStage, urls: dict[str, str]) -> list[str]:
    """Write the recipe of the stage's command, and return the command.

    Args:
        plan: the stages of one seed.
        stage: the stage to run.
        urls: the address of each served model, by name."""
    path = plan.folder / "recipes" / f"{stage.name}.yaml"
    settings = plan.resolve(stage.settings, urls)
    module, verb = "megatron_r1", [stage.config.verb]
    if stage.is_function:
        module, verb = function_stage.__name__, []
        folder = str(plan.folder_of(stage.name))
        settings = {"function": stage.config.function, "folder": folder, "arguments": settings}
    atomic_write(path, dump_yaml(settings))
    return [sys.executable, "-m", module, *verb, str(path)]


def _check_outputs(stage: PipelineStage, folder: Path, referenced: set[str]) -> None:
    last_output = LAST_OUTPUTS.get(stage.config.verb)
    for name in sorted(referenced | ({last_output} if last_output else set())):
        if (folder / name).exists():
            continue
        if name == last_output:
            launch_note = "; its launch must wait for its end, as sbatch --wait does"
            raise RunError(
                f"the command ended well but left no {folder / name}"
                + (launch_note if stage.config.launch else "")
            )
        raise RunError(
            f"it left no {name}, which another stage refers to as ${{{stage.name}.{name}}}; "
            f"there is {', '.join(sorted(path.name for path in folder.iterdir()))}"
        )
    try:
        read_results(folder)
    except UserError as error:
        raise RunError(str(error)) from None
