"""The ranks of an engine after a push that failed on some of them: vLLM's own executor and worker,
with queues in the place of processes."""

from collections import deque
from contextlib import nullcontext
from queue import Queue
from types import SimpleNamespace

import pytest
from vllm.v1.executor.multiproc_executor import MultiprocExecutor, WorkerProc
from vllm.v1.worker import gpu_worker

from megatron_r1.base.processes.children import free_port
from megatron_r1.engines.plugin import backend, patches
from megatron_r1.push.control_messages import IncompletePush, StoreUnreachable

SUCCESS, FAILURE = WorkerProc.ResponseStatus.SUCCESS, WorkerProc.ResponseStatus.FAILURE


class Replies(Queue):
    def dequeue(self, timeout=None):
        return self.get()


def executor_of(calls):
    """An executor whose ranks reply to each call as `calls` says, one reply a rank."""
    queues = [Replies() for _ in calls[0]]
    replies = iter(calls)

    def enqueue(message):
        for queue, reply in zip(queues, next(replies), strict=True):
            queue.put(reply)

    return SimpleNamespace(
        rpc_broadcast_mq=SimpleNamespace(enqueue=enqueue),
        is_failed=False,
        response_mqs=queues,
        futures_queue=deque(),
    )


@pytest.fixture
def collective_rpc(monkeypatch):
    upstream = MultiprocExecutor.collective_rpc
    monkeypatch.setattr(MultiprocExecutor, "collective_rpc", upstream)  # is put back
    patches.read_every_reply()
    return MultiprocExecutor.collective_rpc


@pytest.mark.parametrize("failed", [[0], [1], [0, 1], [0, 1, 2]])
def test_a_call_that_fails_leaves_no_reply_for_the_next_one(collective_rpc, failed):
    first = [(FAILURE, f"rank {r}") if r in failed else (SUCCESS, f"old {r}") for r in range(3)]
    later = [[(SUCCESS, (call, rank)) for rank in range(3)] for call in "ab"]
    executor = executor_of([first, *later])
    with pytest.raises(RuntimeError, match=f"Worker failed with error 'rank {failed[0]}'"):
        collective_rpc(executor, "init_weight_transfer_engine")
    assert collective_rpc(executor, "start_weight_update") == [("a", rank) for rank in range(3)]
    pending = collective_rpc(executor, "update_weights", non_block=True)
    assert pending.result() == [("b", rank) for rank in range(3)]


def test_a_call_of_one_rank_reads_its_reply_only(collective_rpc):
    executor = executor_of([[(SUCCESS, 0), (SUCCESS, 1)], [(FAILURE, "rank 0"), (SUCCESS, 1)]])
    assert collective_rpc(executor, "take_draft_token_ids", unique_reply_rank=1) == 1
    assert [queue.qsize() for queue in executor.response_mqs] == [1, 0]
    executor.response_mqs[0].get()
    with pytest.raises(RuntimeError, match="Worker failed with error 'rank 0'"):
        collective_rpc(executor, "check_health", timeout=10)


def test_other_calls_raise_at_the_first_error(collective_rpc):
    """The rank behind it may wait for the failed one in a collective, and never reply."""
    executor = executor_of([[(FAILURE, "out of memory"), (SUCCESS, 1)]])
    with pytest.raises(RuntimeError, match="Worker failed with error 'out of memory'"):
        collective_rpc(executor, "determine_available_memory")
    assert [queue.qsize() for queue in executor.response_mqs] == [0, 1]


class Backend:
    """Stands for our weight-transfer backend. is_complete: whether this rank gets the push."""

    supports_draft_weight_update = False

    def __init__(self, is_complete):
        self.is_complete = is_complete

    def update_weights(self, info):
        if not self.is_complete:
            raise IncompletePush("push 5 broke off")

    def parse_init_info(self, info):
        return info

    def init_transfer_engine(self, info): ...
    def start_weight_update(self): ...
    def reset_weight_update_target(self): ...


def test_a_rank_that_has_loaded_a_push_which_another_has_not_takes_it_again(monkeypatch):
    worker_class = gpu_worker.Worker
    upstream = worker_class.init_weight_transfer_engine
    monkeypatch.setattr(worker_class, "init_weight_transfer_engine", upstream)  # is put back
    monkeypatch.setattr(gpu_worker, "set_current_vllm_config", lambda config: nullcontext())
    patches.end_unfinished_updates()
    for is_complete in (False, True):
        worker = object.__new__(worker_class)
        worker.weight_transfer_engine = Backend(is_complete)
        worker._weight_update_active, worker.vllm_config = False, None
        worker.start_weight_update()
        with nullcontext() if is_complete else pytest.raises(IncompletePush):
            worker.update_weights({})
        worker.init_weight_transfer_engine({})
        worker.weight_transfer_engine.is_complete = True
        worker.start_weight_update()
        worker.update_weights({})


def test_a_store_that_cannot_be_reached_is_named_with_the_setting():
    port = free_port("127.0.0.1")
    init = backend.PushInitInfo(("127.0.0.1", port), "engine", [], timeout_seconds=0.2)
    rank = object.__new__(backend.PushTransferEngine)
    expected = f"store_unreachable: .*127.0.0.1:{port} .*within 0.2 s.*rollout.hosts_address"
    with pytest.raises(StoreUnreachable, match=expected):
        rank.init_transfer_engine(init)
