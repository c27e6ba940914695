"""The execution of the chosen stages of every seed that are not done, several at a time."""

import time
from collections.abc import Callable, Collection, Hashable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple, TypeVar

from megatron_r1.base.errors import Cause, RunError, UserError
from megatron_r1.pipeline import manifest
from megatron_r1.pipeline.graph import StageGraph
from megatron_r1.pipeline.pipeline_recipe import PipelineConfig
from megatron_r1.pipeline.results import read_results, result_headline
from megatron_r1.pipeline.stage_runner import Runner, StopSignals
from megatron_r1.pipeline.stages import PipelinePlan
from megatron_r1.pipeline.status import (
    StageState,
    all_statuses,
    stage_status,
    stale_text,
    status_lines,
)
from megatron_r1.reporting.formatting import format_duration

Task = TypeVar("Task", bound=Hashable)


class SeedStage(NamedTuple):
    """A node of the work to do: one stage of the graph, for one seed."""

    seed: int
    stage: str


class Executor:
    """Runs stages and keeps their statuses up to date.

    Args:
        config: the pipeline's section of the recipe.
        plans: one plan per seed, of the same stages.
        graph: the stages and their order.
        signals: the requests to stop."""

    def __init__(
        self,
        config: PipelineConfig,
        plans: Sequence[PipelinePlan],
        graph: StageGraph,
        signals: StopSignals,
    ) -> None:
        self._config, self._graph, self._signals = config, graph, signals
        self._plans = {plan.seed: plan for plan in plans}
        self._statuses = {plan.seed: all_statuses(plan, graph) for plan in plans}

    def run(self, stage_names: Sequence[str]) -> None:
        """Run the chosen stages of every seed that are not done.

        Raises:
            RunError: a stage fails.
            UserError: a stage has become stale and may not be redone.
            KeyboardInterrupt: a signal asked to stop.
        """
        for seed, plan in self._plans.items():
            print(f"{plan.folder} · {len(stage_names)} stages · seed {seed}")
            print("\n".join(status_lines(plan, stage_names, self._statuses[seed])), flush=True)
        tasks = [SeedStage(seed, name) for seed in self._plans for name in stage_names]
        upstream = self._graph.upstream
        needs = {
            task: [task._replace(stage=name) for name in upstream[task.stage]] for task in tasks
        }
        run_all(tasks, needs.__getitem__, self._run_stage, self._config.jobs, self.report_failure)

    def report_failure(self, error: Exception, running: list[SeedStage]) -> None:
        """Print that a stage has failed while the stages `running` go on."""
        names = ", ".join(map(self._task_name, running))
        going_on = f"\nno other stage begins; still running: {names} (Ctrl-C stops that)"
        _print_with_time(f"{error}{going_on if running else ''}")

    def _run_stage(self, task: SeedStage) -> None:
        """Run a stage whose upstream is done, unless it is done itself."""
        self._signals.raise_if_stopped()
        plan, statuses = self._plans[task.seed], self._statuses[task.seed]
        name, title = task.stage, self._task_name(task)
        stage, upstream = plan.stages[name], self._graph.upstream[name]
        # Its upstream may have been done again, and may have come out the same.
        upstream_statuses = {upper: statuses[upper] for upper in upstream}
        statuses[name] = stage_status(plan, stage, upstream_statuses)
        if statuses[name].state is StageState.DONE:
            return
        if statuses[name].state is StageState.STALE:
            if not self._config.rerun:
                raise UserError(
                    stale_text(plan, {name: statuses[name]}),
                    key=f"stages.{name}",
                    cause=Cause.CHANGED,
                )
            _print_with_time(f"{title}: what it was is now in {_move_aside(plan.folder_of(name))}")
        continues = manifest.read_record(plan.folder_of(name), manifest.BEGUN_FILE) is not None
        action = "continues" if continues else "begins"
        _print_with_time(f"{title} ({stage.config.verb}) {action}; log {plan.log_of(name)}")
        prefix = f"{title}: " if self._config.jobs > 1 else ""
        try:
            Runner(plan, self._signals, _print_with_time, prefix).run(
                stage, upstream, _referenced_outputs(plan, name)
            )
        except RunError as failure:
            raise RunError(
                f"stage {title} failed: {failure}\nThe same command continues with this stage."
            ) from None
        statuses[name] = stage_status(plan, stage, upstream_statuses)
        result = result_headline(read_results(plan.folder_of(name)))
        duration = format_duration(statuses[name].seconds or 0.0)
        _print_with_time(
            f"{title} is {statuses[name].state} after {duration}{f': {result}' if result else ''}"
        )

    def _task_name(self, task: SeedStage) -> str:
        seeds = self._config.seeds
        return f"{self._plans[task.seed].folder.name}/{task.stage}" if seeds else task.stage


def run_all(
    tasks: Sequence[Task],
    needs: Callable[[Task], Collection[Task]],
    work: Callable[[Task], None],
    jobs: int,
    on_failure: Callable[[Exception, list[Task]], None],
) -> None:
    """Call `work` for every task, after the tasks in `tasks` that it needs, at most `jobs` at a
    time.

    After a failure no other task begins, and the running ones finish.

    Args:
        tasks: the tasks; of those that are ready, the first one in this order begins first.
        needs: returns the tasks that a task needs.
        work: the function that does a task, called in threads.
        jobs: the most tasks at a time.
        on_failure: called with the exception of a task and the tasks still running, if there are
            any or an earlier task has failed already.

    Raises:
        Exception: the first one that a task raised."""
    sorter = TopologicalSorter({task: [n for n in needs(task) if n in tasks] for task in tasks})
    sorter.prepare()
    ready_tasks: list[Task] = []
    running_tasks: dict[Future[None], Task] = {}
    first: BaseException | None = None
    with ThreadPoolExecutor(jobs, thread_name_prefix="stage") as threads:
        while True:
            if first is None:
                ready_tasks = sorted([*ready_tasks, *sorter.get_ready()], key=tasks.index)
                while ready_tasks and len(running_tasks) < jobs:
                    task = ready_tasks.pop(0)
                    running_tasks[threads.submit(work, task)] = task
            if not running_tasks:
                break
            for future in wait(running_tasks, return_when=FIRST_COMPLETED).done:
                task = running_tasks.pop(future)
                if (error := future.exception()) is None:
                    sorter.done(task)
                    continue
                if isinstance(error, Exception) and (running_tasks or first is not None):
                    on_failure(error, list(running_tasks.values()))
                first = first or error
    if first is not None:
        raise first


def _move_aside(folder: Path) -> Path:
    """Rename a stage's folder to the first free one of `STAGE.old-1`, `.old-2` and so on."""
    number = 1
    while (old_folder := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    return folder.rename(old_folder)


def _referenced_outputs(plan: PipelinePlan, name: str) -> set[str]:
    """Return the files of a stage that other stages refer to."""
    names = {ref for stage in plan.stages.values() for _, ref in stage.references}
    return {ref.partition(".")[2] for ref in names if ref.startswith(f"{name}.")}


def _print_with_time(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)
