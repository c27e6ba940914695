"""A pipeline's run: chosen stages of every seed, those that are not done, brought to their end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from megatron_r1.reporting.wording import duration
from megatron_r1.workflow import record
from megatron_r1.workflow.figures import figures_of, headline
from megatron_r1.workflow.graph import Graph
from megatron_r1.workflow.plan import Plan
from megatron_r1.workflow.recipe import PipelineConfig
from megatron_r1.workflow.runner import Runner, Signals, StageFailed
from megatron_r1.workflow.schedule import run_all
from megatron_r1.workflow.state import State, examine, examine_all
from megatron_r1.workflow.status import stale_text, status_lines


class Task(NamedTuple):
    """One stage of one seed."""

    seed: int
    stage: str


class Work:
    """plans: one per seed, of the same stages."""

    def __init__(
        self, config: PipelineConfig, plans: Sequence[Plan], graph: Graph, signals: Signals
    ) -> None:
        self._config, self._graph, self._signals = config, graph, signals
        self._plans = {plan.seed: plan for plan in plans}
        self._statuses = {plan.seed: examine_all(plan, graph) for plan in plans}

    def run(self, chosen: Sequence[str]) -> None:
        """Raises RuntimeError when a stage fails, ValueError for one that has become stale and may
        not be redone, KeyboardInterrupt when it was asked to stop."""
        for seed, plan in self._plans.items():
            print(f"{plan.folder} · {len(chosen)} stages · seed {seed}")
            print("\n".join(status_lines(plan, chosen, self._statuses[seed])), flush=True)
        tasks = [Task(seed, name) for seed in self._plans for name in chosen]
        run_all(tasks, self._needs, self._do, self._config.jobs, self._failed)

    def _needs(self, task: Task) -> list[Task]:
        return [Task(task.seed, name) for name in self._graph.upstream[task.stage]]

    def _do(self, task: Task) -> None:
        """Bring a stage to its end and its status up to date, those above it being done."""
        self._signals.raise_if_asked()
        plan, statuses = self._plans[task.seed], self._statuses[task.seed]
        name, called = task.stage, self._called(task)
        stage, upstream = plan.stages[name], self._graph.upstream[name]
        # What stands above it may have been done again, and may have come out the same.
        above = {upper: statuses[upper] for upper in upstream}
        statuses[name] = examine(plan, stage, above)
        if statuses[name].state is State.DONE:
            return
        if statuses[name].state is State.STALE:
            if not self._config.rerun:
                raise ValueError(stale_text(plan, {name: statuses[name]}))
            _say(f"{called}: what it was is now in {_move_aside(plan.folder_of(name))}")
        goes_on = record.read(plan.folder_of(name), record.BEGUN) is not None
        begins = "continues" if goes_on else "begins"
        _say(f"{called} ({stage.config.verb}) {begins}; log {plan.log_of(name)}")
        runner = Runner(plan, self._signals, _say, f"{called}: " if self._config.jobs > 1 else "")
        try:
            runner.run(stage, upstream, _wanted(plan, name))
        except StageFailed as failure:
            raise RuntimeError(
                f"stage {called} failed: {failure}\nThe same command continues with this stage."
            ) from None
        statuses[name] = examine(plan, stage, above)
        told = headline(figures_of(plan.folder_of(name)))
        took = duration(statuses[name].seconds or 0.0)
        _say(f"{called} is {statuses[name].state} after {took}{f': {told}' if told else ''}")

    def _failed(self, error: Exception, others: list[Task]) -> None:
        waiting = ", ".join(map(self._called, others))
        going_on = f"\nno other stage begins; still running: {waiting} (Ctrl-C stops that)"
        _say(f"{error}{going_on if others else ''}")

    def _called(self, task: Task) -> str:
        seeds = self._config.seeds
        return f"{self._plans[task.seed].folder.name}/{task.stage}" if seeds else task.stage


def _move_aside(folder: Path) -> Path:
    """Rename a stage's folder to the first of `STAGE.old-1`, `.old-2`, … that is free."""
    number = 1
    while (old := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    return folder.rename(old)


def _wanted(plan: Plan, name: str) -> set[str]:
    """What other stages refer to in this one's folder."""
    found = {ref for stage in plan.stages.values() for _, ref in stage.references}
    return {ref.partition(".")[2] for ref in found if ref.startswith(f"{name}.")}


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)
