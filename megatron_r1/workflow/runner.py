"""One stage, run: its recipe written, its models served, its command watched until it ends."""

from __future__ import annotations

import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

from megatron_r1.files import atomic_write
from megatron_r1.processes import stopping
from megatron_r1.processes.logs import excerpt
from megatron_r1.reporting.run_folder import is_locked
from megatron_r1.workflow import record, serving
from megatron_r1.workflow.child import Child, describe_status
from megatron_r1.workflow.figures import figures_of
from megatron_r1.workflow.plan import Plan, Stage

POLL_SECONDS = 0.1
LOCK_SECONDS = 30.0
STOPPED = 130
COMPLETE = {
    "sft": "hf",
    "rl": "hf",
    "reward-model": "hf",
    "sample": "curation.json",
    "eval": "eval.json",
}
"""What a verb leaves when it has come to its end."""


class StageFailed(RuntimeError):
    """A stage ended by itself without being done; the message is the diagnosis."""


class Signals:
    """Ctrl-C and SIGTERM, counted within the block, so that the work in hand can end in order."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> Signals:
        numbers = (signal.SIGINT, signal.SIGTERM)
        self._before = {number: signal.signal(number, self._on_signal) for number in numbers}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def raise_if_asked(self) -> None:
        if self.count:
            raise KeyboardInterrupt

    def _on_signal(self, *_: object) -> None:
        self.count += 1


@dataclass(frozen=True)
class Runner:
    """say: shows a line to whoever watches. prefix: of every line that a command says, where others
    run beside it; then none of them gets the terminal for its live view."""

    plan: Plan
    signals: Signals
    say: Callable[[str], None]
    prefix: str = ""

    def run(self, stage: Stage, upstream: tuple[str, ...], wanted: set[str]) -> None:
        """Bring `stage` to its end. wanted: outputs that other stages refer to.

        Raises StageFailed, and KeyboardInterrupt when it was asked to stop; in both cases it
        continues when run again.
        """
        folder = self.plan.folder_of(stage.name)
        self._wait_for_folder(folder)
        self._clear(stage, folder)
        record.begin(self.plan, stage, upstream, _last_sign(self.plan.log_of(stage.name)))
        try:
            command = self._work(stage, folder)
            _check_outputs(stage, folder, wanted)
        except (StageFailed, serving.ServingError) as error:
            record.end_attempt(folder, str(error))
            raise StageFailed(str(error)) from None
        except KeyboardInterrupt:
            record.end_attempt(folder, None)
            raise
        record.finish(self.plan, stage, upstream, command)

    def _wait_for_folder(self, folder: Path) -> None:
        """Until what a killed pipeline had started is gone; a job elsewhere may hold it longer."""
        deadline = time.monotonic() + LOCK_SECONDS
        if is_locked(folder):
            self.say(f"waiting for the process that still works in {folder}")
        while is_locked(folder) and time.monotonic() < deadline:
            self.signals.raise_if_asked()
            time.sleep(POLL_SECONDS)
        if is_locked(folder):
            raise StageFailed(
                f"a process of an earlier start still works in {folder}, on this machine or, with "
                "a launch, on another: wait for it, or end it (kill, scancel)"
            )

    def _clear(self, stage: Stage, folder: Path) -> None:
        """Only what is worth continuing stays."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / stopping.FILE).unlink(missing_ok=True)
        if stage.is_function or not record.has_made_something(folder):
            for path in folder.iterdir():
                if path.name == record.BEGUN:
                    continue
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()

    def _work(self, stage: Stage, folder: Path) -> list[str]:
        """Returns the command that did it."""
        configs = {name: self.plan.server(server) for name, server in stage.config.serve.items()}
        before = (record.read(folder, record.BEGUN) or {})["ports"]
        ports = serving.choose_ports(configs, before)
        record.keep_ports(folder, ports)
        logs = {name: self.plan.log_of(stage.name, name) for name in configs}
        if configs:
            self.say(f"serving {', '.join(configs)} for {stage.name}")
        with serving.served(configs, ports, logs, self.signals.raise_if_asked) as servers:
            command = write_recipe(self.plan, stage, {s.name: s.url for s in servers})
            launch = self.plan.resolve(stage.config.launch, {s.name: s.url for s in servers})
            log = self.plan.log_of(stage.name)
            child = Child(command, log, launch=launch, shown_as="  " + self.prefix)
            try:
                self._watch(child, stage, folder, servers)
            finally:
                child.end()
        return [*shlex.split(launch), *command]

    def _watch(
        self, child: Child, stage: Stage, folder: Path, servers: list[serving.Server]
    ) -> None:
        asked = 0
        while (status := child.wait(POLL_SECONDS)) is None:
            for server in servers:
                server.check()
            if self.signals.count > asked:
                asked = self.signals.count
                self._ask_to_stop(child, stage, folder)
        (folder / stopping.FILE).unlink(missing_ok=True)
        if status == 0:
            return
        if asked or status == STOPPED:
            raise KeyboardInterrupt
        raise StageFailed(f"{describe_status(status)}; from {child.log}:\n{excerpt(child.said())}")

    def _ask_to_stop(self, child: Child, stage: Stage, folder: Path) -> None:
        if self.signals.count == 1:
            self.say(f"stopping {stage.name} when its step is done; once more ends it at once")
        if self.signals.count == 1 and stage.config.launch:
            # A launcher may leave its job alone when it is ended itself; the job sees this file.
            (folder / stopping.FILE).touch()
        elif self.signals.count <= 2:
            child.ask_to_end()
        else:
            child.kill()


def write_recipe(plan: Plan, stage: Stage, urls: dict[str, str]) -> list[str]:
    """Write the file that the stage's command is given; returns the command."""
    path = plan.recipe_of(stage.name)
    told = plan.resolve(stage.told, urls)
    module, verb = "megatron_r1", [stage.config.verb]
    if stage.is_function:
        module, verb = "megatron_r1.workflow.make", []
        folder = str(plan.folder_of(stage.name))
        told = {"function": stage.config.function, "folder": folder, "arguments": told}
    atomic_write(path, yaml.safe_dump(told, sort_keys=False, allow_unicode=True))
    return [sys.executable, "-m", module, *verb, str(path)]


def _check_outputs(stage: Stage, folder: Path, wanted: set[str]) -> None:
    complete = COMPLETE.get(stage.config.verb)
    for name in sorted(wanted | ({complete} if complete else set())):
        if (folder / name).exists():
            continue
        if name == complete:
            detached = "; its launch must wait for its end, as sbatch --wait does"
            raise StageFailed(
                f"the command ended well but left no {folder / name}"
                + (detached if stage.config.launch else "")
            )
        raise StageFailed(
            f"it left no {name}, which another stage refers to as ${{{stage.name}.{name}}}; "
            f"there is {', '.join(sorted(path.name for path in folder.iterdir()))}"
        )
    try:
        figures_of(folder)
    except ValueError as error:
        raise StageFailed(str(error)) from None


def _last_sign(log: Path) -> float | None:
    return log.stat().st_mtime if log.is_file() else None
