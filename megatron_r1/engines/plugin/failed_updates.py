"""Patches of vLLM 0.32, on every platform, for an engine of several ranks where some ranks fail in
a push: it is connected anew and gets the push again, so its ranks must stay in step. Paths are
below vllm/."""

import functools
from collections.abc import Sequence
from typing import Any

TRANSFER = "_weight_transfer_engine", "_weight_update", "_weights"
"""Ends of the names of a worker's methods that load a push."""


def apply() -> None:
    """Apply both patches, once per process."""
    read_every_reply()
    end_unfinished_updates()


def read_every_reply() -> None:
    """Let a call of a weight transfer read the replies of all ranks before it raises the error of
    one.

    Upstream: v1/executor/multiproc_executor.py: `MultiprocExecutor.collective_rpc.get_response`.
    Without it: the call raises at the first error, and the replies of the ranks behind it stay in
    their queues. The next call takes them for its own, and all later ones are late by one. Goes
    when: it reads them. Other calls are left as they are: an engine ends where one of them fails,
    and must not wait for ranks that are in a collective with the one that has failed."""
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor

    upstream = MultiprocExecutor.collective_rpc

    def collective_rpc(
        self: Any,
        method: Any,
        timeout: float | None = None,
        args: tuple = (),
        kwargs: dict | None = None,
        non_block: bool = False,
        unique_reply_rank: int | None = None,
        **aggregators: Any,
    ) -> Any:
        queues, call = tuple(self.response_mqs), (method, timeout, args, kwargs)
        future = upstream(self, *call, True, unique_reply_rank, **aggregators)
        is_transfer = isinstance(method, str) and method.endswith(TRANSFER)
        if is_transfer and timeout is None and unique_reply_rank is None:
            future.get_response = functools.partial(replies_of_all, queues)
        return future if non_block else future.result()

    MultiprocExecutor.collective_rpc = collective_rpc


def replies_of_all(queues: Sequence[Any]) -> list[Any]:
    """Return the next reply of each rank's queue. Raises RuntimeError with the first rank's error,
    as upstream, when all have replied."""
    from vllm.v1.executor.multiproc_executor import WorkerProc

    replies = [queue.dequeue() for queue in queues]
    for status, result in replies:
        if status != WorkerProc.ResponseStatus.SUCCESS:
            raise RuntimeError(
                f"Worker failed with error '{result}', please check the stack trace above for the "
                "root cause"
            )
    return [result for _, result in replies]


def end_unfinished_updates() -> None:
    """Let a rank that connects to a trainer forget the update before.

    Upstream: v1/worker/gpu_worker.py: `Worker._start_weight_update`. Without it: where one
    rank has loaded a push and another has not, the first still waits for `finish_weight_update`,
    and refuses the repeated push as a second one. Goes when: the update of all ranks ends with the
    error of one."""
    from vllm.v1.worker.gpu_worker import Worker

    upstream = Worker.init_weight_transfer_engine

    def init_weight_transfer_engine(self: Any, init_info: dict) -> None:
        self._weight_update_active = False
        upstream(self, init_info)

    Worker.init_weight_transfer_engine = init_weight_transfer_engine
