"""How a fleet handles unusable replies: servers on loopback that fail in ways in which a real one
fails rarely."""

import asyncio
import contextlib
import json

import pytest
from fakes.engine import Peer
from waiting import until

from megatron_r1.engines.fleet import engine_replacer
from megatron_r1.engines.fleet.engine_fleet import EngineFleet
from megatron_r1.engines.server.errors import (
    EngineDied,
    EngineError,
    EngineTimeout,
    WeightsUnavailable,
)

GARBAGE = {
    "no number": {"logprobs": {"content": [{"logprob": -9999.0}]}},
    "no log-probabilities": {"logprobs": None},
    "no such token": {"token_ids": [10]},
    "no such version": {"weight_versions": [{"version": "default", "start": 0, "end": 1}]},
}


SLEEP = "/sleep?level=2&mode=wait"


def good(_):
    return {}


def run(tmp_path, peers, story, *, num_engines=1, max_restarts=0, **settings):
    """Return what `story` returns of a fleet that has started.

    Args:
        peers: the servers of the engines, in the order in which they are started.
        story: a coroutine function of the fleet."""
    (tmp_path / "config.json").write_text('{"vocab_size": 10}')
    waiting = list(peers)

    async def whole():
        async with contextlib.AsyncExitStack() as servers:
            for peer in peers:
                await servers.enter_async_context(peer.served())
            fleet = EngineFleet(
                num_engines,
                tmp_path,
                max_restarts=max_restarts,
                make_server=lambda *args, **settings: waiting.pop(0)(*args, **settings),
                **settings,
            )
            async with fleet:
                await fleet.start(tmp_path)
                return await story(fleet)

    return asyncio.run(whole())


@pytest.fixture(autouse=True)
def no_waiting_for_last_words(monkeypatch):
    monkeypatch.setattr("megatron_r1.engines.fleet.engine.DEATH_WAIT_SECONDS", 0.0)


async def sample(fleet, count=1):
    calls = (fleet.generate([3], n=2, max_tokens=4) for _ in range(count))
    groups = await asyncio.gather(*calls)
    return [[response.token_ids.tolist() for response in group] for group in groups]


def test_a_group_larger_than_max_num_seqs_is_several_requests(tmp_path):
    """A request for more is what vLLM refuses, with status 400."""
    peer = Peer(good)

    async def story(fleet):
        return [len(await fleet.generate([3], n=n, max_tokens=4)) for n in (4, 10)]

    assert run(tmp_path, [peer], story, max_num_seqs=4) == [4, 10]
    assert peer.num_calls == 1 + 3 and sorted(peer.asked) == [2, 4, 4, 4]


@pytest.mark.parametrize("first", [*GARBAGE.values(), (500, "boom"), (503, "busy"), "cut"], ids=str)
def test_unusable_replies_are_repeated(tmp_path, first):
    async def story(fleet):
        return await sample(fleet), fleet.metrics()

    peer = Peer(lambda k: first if k == 0 else {})
    groups, metrics = run(tmp_path, [peer], story)
    assert groups == [[[7], [7]]]
    assert metrics == {"engines/up": 1, "engines/restarts": 0, "engines/requeued": 2}


def test_a_refusal_is_the_callers_mistake_and_is_not_repeated(tmp_path):
    peer = Peer(lambda k: (400, "prompt too long"))
    with pytest.raises(EngineError, match="400.*prompt too long"):
        run(tmp_path, [peer], sample)
    assert peer.num_calls == 1


def test_a_request_that_takes_too_long_ends_the_run(tmp_path):
    """Every engine would take as long."""
    peer = Peer(lambda k: "hang")
    with pytest.raises(EngineTimeout, match="generate"):
        run(tmp_path, [peer], sample, request_timeout_seconds=0.3)
    assert peer.num_calls <= 1  # 0 where the call itself took that long


@pytest.mark.parametrize("wrong", [GARBAGE["no number"], "cut"], ids=str)
def test_an_engine_that_fails_often_is_replaced_and_attracts_no_more_work(tmp_path, wrong):
    """Its useless answers come at once: the least loaded engine is the broken one."""
    broken, fine, fresh = Peer(lambda k: wrong), Peer(good), Peer(good)

    async def story(fleet):
        messages = []
        fleet.state.notify = messages.append
        groups = await sample(fleet, count=40)
        await until(lambda: not fleet.replacer.tasks)
        return groups, messages, [engine.server for engine in fleet.engines], fleet.num_restarts

    groups, messages, servers, restarts = run(
        tmp_path, [broken, fine, fresh], story, num_engines=2, max_restarts=3
    )
    assert groups == [[[7], [7]]] * 40
    assert servers == [fresh, fine]
    assert restarts == 1
    assert len(messages) == 2 and all("engine-0" in message for message in messages)
    assert not broken.is_alive()


def test_without_a_restart_left_the_others_still_answer(tmp_path):
    broken, fine = Peer(lambda k: GARBAGE["no number"]), Peer(good)

    async def story(fleet):
        return await sample(fleet, count=20), [engine.accepts_groups for engine in fleet.engines]

    groups, accepts_groups = run(tmp_path, [broken, fine], story, num_engines=2)
    assert groups == [[[7], [7]]] * 20
    assert accepts_groups == [True, True]


def test_a_dead_engine_gets_no_request(tmp_path):
    async def story(fleet):
        engine = fleet.engines[0]
        engine.death_noticed.set()
        await engine.client.close()
        with pytest.raises(EngineDied, match="engine-0.*stopped by the test"):
            await engine.await_call(engine.client.generate([3], n=1, max_tokens=1))
        return engine.client._session

    peer = Peer(good)
    assert run(tmp_path, [peer], story) is None  # no session was opened that would stay open
    assert peer.num_calls == 0


def test_one_that_ran_out_of_memory_is_replaced_at_once(tmp_path):
    full, fresh = Peer(lambda k: (500, "CUDA out of memory. Tried to allocate")), Peer(good)

    async def story(fleet):
        return await sample(fleet), fleet.num_restarts

    assert run(tmp_path, [full, fresh], story, max_restarts=1) == ([[[7], [7]]], 1)
    assert full.num_calls == 1


def test_where_fresh_engines_fail_too_the_call_fails(tmp_path):
    peers = [Peer(lambda k: GARBAGE["no number"]) for _ in range(3)]
    with pytest.raises(EngineError, match="5 .*token 7.*-9999"):
        run(tmp_path, peers, sample, max_restarts=2)
    assert sum(peer.num_calls for peer in peers) == 5
    assert peers[1].num_calls > 0  # it met a fresh one


def test_a_slow_engine_is_drained_before_it_is_replaced(tmp_path):
    peers = [Peer(good), Peer(good), Peer(good)]

    async def story(fleet):
        slow = fleet.engines[0]
        slow.num_running += 1  # something is in flight
        fleet.replacer.retire(slow, EngineError("engine-0 made 1 token a second"))
        await sample(fleet, count=3)
        in_between = slow.is_up, slow.accepts_groups, slow.server.is_alive()
        slow.num_running -= 1
        await until(lambda: not fleet.replacer.tasks)
        return in_between, fleet.engines[0].server

    between, server = run(tmp_path, peers, story, num_engines=2, max_restarts=1)
    assert between == (True, False, True)
    assert server is peers[2]
    assert not peers[0].is_alive()


def test_without_a_restart_left_a_slow_engine_stays(tmp_path):
    async def story(fleet):
        fleet.replacer.retire(fleet.engines[0], EngineError("slow"))
        return await sample(fleet), fleet.engines[0].accepts_groups

    assert run(tmp_path, [Peer(good)], story) == ([[[7], [7]]], True)


def test_an_engine_that_joins_takes_part(tmp_path):
    peers = [Peer(good) for _ in range(2)]

    async def story(fleet):
        added = await fleet.add_engine()
        groups = await sample(fleet, count=4)
        return added.index, [engine.index for engine in fleet.engines], groups

    assert run(tmp_path, peers, story) == (1, [0, 1], [[[7], [7]]] * 4)
    assert [peer.is_alive() for peer in peers] == [False, False]


def test_engines_that_join_while_the_fleet_sleeps_have_names_of_their_own(tmp_path):
    peers = [Peer(good) for _ in range(3)]

    async def story(fleet):
        await fleet.sleep()
        joining = [asyncio.create_task(fleet.add_engine()) for _ in range(2)]
        for _ in range(20):
            await asyncio.sleep(0)
        await fleet.swap_weights({}, 1)
        await asyncio.gather(*joining)
        return [engine.name for engine in fleet.engines]

    assert sorted(run(tmp_path, peers, story)) == ["engine-0", "engine-1", "engine-2"]


def test_engines_wake_for_a_push_weights_first_and_their_cache_last(tmp_path):
    """An update while the weights sleep kills vLLM, and so does a step without a cache."""
    peer = Peer(good)

    async def story(fleet):
        del peer.called[:]
        await fleet.sleep()
        await fleet.swap_weights({}, 1)
        asleep = list(peer.called)
        del peer.called[:]
        await fleet.swap_weights({}, 2)
        return asleep, list(peer.called)

    asleep, awake = run(tmp_path, [peer], story)
    assert asleep == [
        "/sleep?level=2&mode=wait",
        "/wake_up?tags=weights",
        "/swap_weights",
        "/wake_up?tags=kv_cache",
        "/resume",
    ]
    assert [path for path in awake if "wake" in path] == []


def test_a_fleet_that_sleeps_is_not_put_to_sleep_again(tmp_path):
    peer = Peer(good)

    async def story(fleet):
        del peer.called[:]
        await asyncio.gather(fleet.sleep(), fleet.sleep())
        await fleet.sleep()
        once = list(peer.called)
        await fleet.swap_weights({}, 1)
        await fleet.sleep()
        return once, peer.called.count("/sleep?level=2&mode=wait")

    assert run(tmp_path, [peer], story) == (["/sleep?level=2&mode=wait"], 2)


def test_an_engine_that_comes_without_weights_sleeps_and_serves_from_the_next_push(tmp_path):
    """Where the others sample in the memory of the trainer (`WeightPusher.send_weights`)."""
    peers = [Peer(good), Peer(good)]

    async def story(fleet):
        @contextlib.asynccontextmanager
        async def send_weights(engine):
            assert fleet.engines_use_memory
            await engine.client.sleep()
            yield False

        fleet.set_weight_sender(send_weights)
        joined = await fleet.add_engine()
        early = joined.is_up, joined.accepts_groups
        groups = await sample(fleet, 4)
        by_first = peers[0].num_calls
        await fleet.sleep()
        assert not fleet.engines_use_memory
        await fleet.swap_weights({}, 1)
        await sample(fleet, 4)
        return early, len(groups), by_first, joined.accepts_groups, peers[1].called.count(SLEEP)

    assert run(tmp_path, peers, story) == ((True, False), 4, 4, True, 1)
    assert peers[1].num_calls


def test_engines_that_have_slept_get_the_same_version_again(tmp_path):
    async def story(fleet):
        await fleet.swap_weights({}, 1)
        with pytest.raises(ValueError, match="version 1"):
            await fleet.swap_weights({}, 1)
        await fleet.sleep()
        await fleet.swap_weights({}, 1)
        return fleet.policy_version

    assert run(tmp_path, [Peer(good)], story) == 1


def test_no_engine_is_replaced_while_the_memory_is_the_trainers(tmp_path):
    peers = [Peer(good), Peer(good)]

    async def story(fleet):
        await fleet.sleep()
        peers[0].is_running = False
        await until(lambda: fleet.replacer.tasks)
        for _ in range(20):
            await asyncio.sleep(0)
        early = peers[1].is_running
        fleet.awake.set()
        groups = await sample(fleet)
        return early, groups

    assert run(tmp_path, peers, story, max_restarts=1) == (False, [[[7], [7]]])


def test_an_engine_whose_connection_breaks_amid_a_push_is_replaced_by_one_with_its_weights(
    tmp_path,
):
    """It may be paused, or hold either version: it must serve nothing more."""
    peers = [Peer(good, cuts="/swap_weights"), Peer(good), Peer(good)]

    async def story(fleet):
        await fleet.swap_weights({}, 1)
        await until(lambda: not fleet.replacer.tasks)
        return fleet.policy_version, [engine.server for engine in fleet.engines], fleet.num_restarts

    version, servers, restarts = run(tmp_path, peers, story, num_engines=2, max_restarts=1)
    assert (version, servers, restarts) == (1, [peers[2], peers[1]], 1)
    assert not peers[0].is_alive()
    assert "/update_weight_version" in peers[2].called


INCOMPLETE_PUSH = {
    "broken link": "push 1 broke off: trainer rank 0: Connection closed by peer",
    "late": "push 1: after 5 s trainer ranks 3 have not sent all of it",
}


@pytest.mark.parametrize("error", INCOMPLETE_PUSH.values(), ids=INCOMPLETE_PUSH)
def test_an_engine_that_did_not_get_the_weights_is_replaced(tmp_path, error):
    answer = json.dumps({"kind": "incomplete_push", "error": f"incomplete_push: {error}"})
    peers = [Peer(good, fails={"/swap_weights": answer}), Peer(good), Peer(good)]

    async def story(fleet):
        await fleet.swap_weights({}, 1)
        await until(lambda: not fleet.replacer.tasks)
        return [engine.server for engine in fleet.engines], fleet.num_restarts

    result = run(tmp_path, peers, story, num_engines=2, max_restarts=1)
    assert result == ([peers[2], peers[1]], 1)


WRONG = "push 1: 1 tensors arrived otherwise than they were sent: lm_head.weight (from rank 0)"


@pytest.mark.parametrize("answer", [WRONG, json.dumps({"error": {"message": WRONG}})])
def test_weights_that_are_wrong_stop_the_run(tmp_path, answer):
    """As plain text and as vLLM answers; neither says that the push is incomplete."""
    peers = [Peer(good, fails={"/swap_weights": answer}), Peer(good)]
    with pytest.raises(EngineError, match="lm_head.weight"):
        run(tmp_path, peers, lambda fleet: fleet.swap_weights({}, 1), num_engines=2, max_restarts=1)


@pytest.mark.parametrize("silence", [0.0, 1e5])
def test_an_engine_that_waits_for_weights_does_not_hang(tmp_path, monkeypatch, silence):
    """vLLM answers nothing while a step of its waits for the rest of a push."""
    monkeypatch.setattr("megatron_r1.engines.fleet.engine_replacer.LIVENESS_CHECK_SECONDS", 0.05)
    release = asyncio.Event()
    peers = [Peer(good, holds={"/is_sleeping": release, "/swap_weights": release}), Peer(good)]

    async def story(fleet):
        fleet.replacer.unresponsive_seconds = 0.2
        with fleet.liveness_grace(silence):
            pushing = asyncio.create_task(fleet.swap_weights({}, 1))
            if silence:
                await asyncio.sleep(1.0)
            else:
                await until(lambda: fleet.num_restarts)
            fleet.replacer.unresponsive_seconds = 1e5
            release.set()
            await pushing
        await until(lambda: not fleet.replacer.tasks)
        return fleet.num_restarts

    assert run(tmp_path, peers, story, max_restarts=1) == (0 if silence else 1)


def test_one_that_cannot_even_be_started_fails_the_fleet(tmp_path):
    """Its groups would wait for ever."""
    peers = [Peer(good)]

    async def story(fleet):
        fleet.make_server = out_of_processes
        peers[0].is_running = False
        await sample(fleet)

    def out_of_processes(*arguments, **settings):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    with pytest.raises(EngineError, match="engine-0.*temporarily unavailable"):
        run(tmp_path, peers, story, max_restarts=1)


def test_the_only_engine_that_serves_is_revived_though_another_is_joining(tmp_path):
    """The joining one may fail, and none would be left."""
    stays_away = asyncio.Event()
    joining = Peer(good, holds={"/update_weight_version": stays_away})
    peers = [Peer(good), joining, Peer(good)]

    async def story(fleet):
        adding = asyncio.create_task(fleet.add_engine())
        await until(lambda: joining.is_running)
        peers[0].is_lost, peers[0].is_running = True, False
        sampling = asyncio.create_task(sample(fleet))
        await until(lambda: fleet.num_restarts)
        joining.is_running = False
        joining.fails["/update_weight_version"] = "gone"
        stays_away.set()
        with pytest.raises(EngineError):
            await adding
        return await sampling, fleet.num_restarts

    assert run(tmp_path, peers, story, max_restarts=2) == ([[[7], [7]]], 1)


def test_one_that_was_starting_gives_its_memory_to_the_trainer(tmp_path):
    """It begins anew when the engines have their memory again; that is no restart."""
    held = asyncio.Event()
    starting = Peer(good, holds={"/update_weight_version": held})
    peers = [Peer(good), Peer(good), starting, Peer(good)]

    async def story(fleet):
        peers[0].is_running = False
        await until(lambda: starting.is_running)
        await fleet.sleep()
        asleep = starting.is_running, peers[3].is_running
        held.set()
        await fleet.swap_weights({}, 1)
        await until(lambda: not fleet.replacer.tasks)
        return asleep, [engine.server for engine in fleet.engines], fleet.num_restarts

    result = run(tmp_path, peers, story, num_engines=2, max_restarts=1)
    assert result == ((False, False), [peers[3], peers[1]], 1)


def test_an_engine_without_weights_costs_no_restart(tmp_path, monkeypatch):
    """A trainer that starts again may take longer than all restarts of an engine."""
    monkeypatch.setattr(engine_replacer, "FIRST_PAUSE_SECONDS", 0.0)
    peers = [Peer(good), *(Peer(good) for _ in range(4))]
    refusals = iter([True] * 3)

    @contextlib.asynccontextmanager
    async def send_weights(engine):
        if next(refusals, False):
            raise WeightsUnavailable(f"{engine.name}: the trainer is gone")
        yield

    async def story(fleet):
        fleet.set_weight_sender(send_weights)
        peers[0].is_running = False
        return (await sample(fleet)), fleet.num_restarts

    assert run(tmp_path, peers, story, max_restarts=1)[1] == 1


def test_a_cancelled_call_to_a_dead_engine_does_not_go_on(tmp_path):
    """The request's own end, which takes a moment, must not hide that its caller was cancelled."""

    begun, ending = asyncio.Event(), asyncio.Event()

    async def ends_slowly():
        try:
            begun.set()
            await asyncio.sleep(1e5)
        finally:
            ending.set()
            await asyncio.sleep(0.2)

    async def story(fleet):
        engine = fleet.engines[0]
        calling = asyncio.create_task(engine.await_call(ends_slowly()))
        await begun.wait()
        engine.death_noticed.set()
        await ending.wait()
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling

    run(tmp_path, [Peer(good), Peer(good)], story, max_restarts=1)


@pytest.mark.parametrize("seed", [20240101 * 1_000_003, -1_000_003])
def test_every_seed_is_one_that_vllm_takes(tmp_path, seed):
    class Started(Peer):
        def __call__(self, model, log, **settings):
            self.settings = settings
            return super().__call__(model, log, **settings)

    peer = Started(good)
    run(tmp_path, [peer], sample, seed=seed)
    assert 0 <= peer.settings["seed"] < 2**32
