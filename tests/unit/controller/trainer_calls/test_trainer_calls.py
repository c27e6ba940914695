"""What the controller's side of the trainer ranks promises, with ranks that only repeat."""

import asyncio

import msgspec
import pytest
from waiting import until

from megatron_r1.base.errors import TrainerError, TrainerLost
from megatron_r1.config import Config
from megatron_r1.controller.trainer_calls.client import TrainerClient
from megatron_r1.trainer.operations import EvaluationOperations, ModelOperations, PushOperations
from megatron_r1.trainer.rank_messages import RankCall, RankReply


class Repeats:
    """One rank, which answers a call with its operation once `answers` is set."""

    def __init__(self):
        self.answers, self.calls = asyncio.Event(), asyncio.Queue()

    async def send(self, rank, call, share):
        self.calls.put_nowait(msgspec.msgpack.decode(call, type=RankCall).operation)

    async def reply(self, seconds):
        try:
            async with asyncio.timeout(seconds):
                await self.answers.wait()
                return RankReply(0, {"operation": await self.calls.get()})
        except TimeoutError:
            return None

    def close(self): ...


@pytest.fixture
def client(tmp_path, monkeypatch):
    model = {"path": "examples/laptop/model"}
    monkeypatch.setattr(
        "megatron_r1.controller.trainer_calls.client.sample_cost", lambda hf_config: None
    )
    client = TrainerClient(Config(model=model), tmp_path)
    client.socket.close()
    client.socket = Repeats()
    client.ranks = [{"rank": 0, "is_last_stage": True, "is_replica_leader": False}]
    return client


def test_the_reply_to_a_cancelled_call_is_not_taken_for_the_next_one(client):
    """An engine that ends while it connects cancels the trainer's part of the connection."""

    async def story():
        given_up = asyncio.create_task(client.call(PushOperations.connect_sets))
        waits = asyncio.create_task(client.call(EvaluationOperations.probe))
        await until(client.socket.calls.qsize)
        given_up.cancel()
        waits.cancel()  # not sent to the rank yet
        after = asyncio.create_task(client.call(ModelOperations.update))
        await asyncio.sleep(0.05)
        assert not after.done() and not client.is_usable
        client.socket.answers.set()
        return await after, client.is_usable

    assert asyncio.run(story()) == ({"operation": "update"}, True)


def test_begun_is_called_when_the_call_is_sent_to_the_ranks(client):
    async def story():
        waiting = []
        first = asyncio.create_task(client.call(ModelOperations.compute_logprobs))
        await until(client.socket.calls.qsize)
        second = asyncio.create_task(
            client.call_all(
                ModelOperations.compute_values, on_start=lambda: waiting.append(client.pending_call)
            )
        )
        await asyncio.sleep(0.05)
        assert not waiting
        client.socket.answers.set()
        assert await second == [{"operation": "compute_values"}]
        await first
        return waiting

    assert asyncio.run(story()) == [None]


def test_a_call_whose_on_start_fails_lets_the_next_call_begin(client):
    def fail():
        raise OSError("no engine")

    async def story():
        with pytest.raises(OSError, match="no engine"):
            await client.call_all(ModelOperations.compute_values, on_start=fail)
        return await asyncio.wait_for(client.call(ModelOperations.update), timeout=60)

    client.socket.answers.set()
    assert asyncio.run(story()) == {"operation": "update"}


def test_a_call_while_the_ranks_start_again_is_a_loss_and_not_an_empty_reply(client):
    client.ranks = []
    with pytest.raises(TrainerLost, match="send_weights"):
        asyncio.run(client.call_all(PushOperations.send_weights))
    client.ranks = [{"rank": 0, "is_last_stage": True, "is_replica_leader": False}]
    client.socket.answers.set()
    assert asyncio.run(client.call(ModelOperations.update)) == {"operation": "update"}


def test_a_reply_of_another_form_is_refused_by_rank_operation_and_field(client):
    client.socket.answers.set()
    with pytest.raises(TrainerError, match="rank 0: its reply to send_weights .*`failures`"):
        asyncio.run(client.call_all(PushOperations.send_weights))
