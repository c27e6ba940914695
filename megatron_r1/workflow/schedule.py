"""Tasks in an order that their needs allow, several at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from typing import TypeVar

Task = TypeVar("Task", bound=Hashable)


def run_all(
    tasks: Sequence[Task],
    needs: Callable[[Task], Collection[Task]],
    work: Callable[[Task], None],
    jobs: int,
    failed: Callable[[Exception, list[Task]], None],
) -> None:
    """`work` of every task, each after those of `tasks` that it needs, at most `jobs` at a time.

    tasks: in the order in which they are begun where several could be; each after its needs.
    work: called in threads, one for each task that runs.
    failed: told what a task raised while others run, which are given, or after others raised.

    After a task has raised no other begins; those that run come to their end. Raises what the first
    has raised.
    """
    left, running, first = list(tasks), {}, None
    with ThreadPoolExecutor(jobs, thread_name_prefix="stage") as threads:
        while running or (left and first is None):
            if first is None:
                unfinished = {*left, *running.values()}
                ready = [task for task in left if unfinished.isdisjoint(needs(task))]
                for task in ready[: jobs - len(running)]:
                    left.remove(task)
                    running[threads.submit(work, task)] = task
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                del running[future]
                if (error := future.exception()) is None:
                    continue
                if isinstance(error, Exception) and (running or first is not None):
                    failed(error, list(running.values()))
                first = first or error
    if first is not None:
        raise first
