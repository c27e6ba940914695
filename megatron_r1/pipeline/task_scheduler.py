"""A scheduler of tasks that need others: each runs in a thread once those are done."""

from collections.abc import Callable, Collection, Hashable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from graphlib import TopologicalSorter
from typing import TypeVar

Task = TypeVar("Task", bound=Hashable)


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
