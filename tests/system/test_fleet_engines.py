"""Two real engines: one is spoiled, one joins, one leaves, and all sleep; every group is answered
with the right log-probabilities."""

import asyncio
import shutil
import time

import pytest
from sampled import TOLERANCE, largest_difference, sample
from tiny_models import QWEN, write_model, write_nan
from waiting import until

from megatron_r1.engines.fleet.engine_fleet import EngineFleet
from megatron_r1.engines.server.server import EngineServer

pytestmark = (
    pytest.mark.more
)  # four starts of vLLM; the rules alone: tests/unit/engines/fleet/test_fleet.py
ENGINES = {"max_model_len": 256, "max_num_seqs": 16, "num_threads": 1}


@pytest.fixture(scope="module")
def models(tmp_path_factory, oracle):
    """`good`, and `spoiled`, whose answers are not numbers."""
    folder = tmp_path_factory.mktemp("models")
    oracle(write_model, folder / "good", QWEN, 0)
    shutil.copytree(folder / "good", folder / "spoiled")
    weights = "model.safetensors"
    oracle(write_nan, folder / "good" / weights, folder / "spoiled" / weights, "model.norm.weight")
    return folder


@pytest.fixture(scope="module")
def fleet(models, loop, tmp_path_factory):
    """A fleet of two; the first engine starts with spoiled weights."""
    is_first = True

    def make_server(model, log, **settings):
        nonlocal is_first
        model, is_first = models / "spoiled" if is_first else model, False
        return EngineServer(model, log, **settings)

    logs = tmp_path_factory.mktemp("logs")
    fleet = EngineFleet(2, logs, max_restarts=2, make_server=make_server, **ENGINES)
    loop(fleet.start(models / "good"))
    yield fleet
    loop(fleet.close())


async def rounds(fleet, count):
    """Many groups at once, as a batch asks for them."""
    return await asyncio.gather(*(sample(fleet, n=2, max_tokens=40) for _ in range(count)))


def assert_right(oracle, models, made):
    for groups in made:
        assert largest_difference(oracle, models / "good", groups) <= TOLERANCE


@pytest.fixture(scope="module")
def replaced(loop, fleet):
    """The spoiled engine, the messages about it, and what was sampled until it was replaced and
    afterwards."""
    spoiled, messages = fleet.engines[0], []
    fleet.state.notify = messages.append

    async def sample_until_replaced():
        made = await rounds(fleet, 4)
        await until(lambda: not fleet.replacer.tasks)
        return made + await rounds(fleet, 4)

    return spoiled, messages, loop(sample_until_replaced())


def test_an_engine_that_answers_nonsense_is_found_and_replaced(models, oracle, fleet, replaced):
    """Nothing but its answers tells that it is ill."""
    spoiled, messages, made = replaced
    assert fleet.num_restarts == 1, messages
    assert "engine-0 cannot go on" in messages[0] and "log-probability of token" in messages[0]
    assert fleet.metrics()["engines/requeued"] >= 2
    assert fleet.engines[0] is not spoiled and not spoiled.server.is_alive()
    assert_right(oracle, models, made)


@pytest.mark.usefixtures("replaced")
def test_engines_share_a_batch_evenly(loop, fleet):
    begun = time.monotonic()
    loop(rounds(fleet, 8))
    first, second = (
        sum(group.tokens for group in engine.stats._groups if group.at > begun)
        for engine in fleet.engines
    )
    assert first + second == 8 * 3 * 2 * 40
    assert 0.5 < first / second < 2
    assert all(engine.num_running == 0 for engine in fleet.engines)


@pytest.mark.usefixtures("replaced")
def test_an_engine_joins_amid_a_batch(models, oracle, loop, fleet):
    async def change():
        running = asyncio.ensure_future(rounds(fleet, 4))
        added = await fleet.add_engine()
        first = await running
        return added, first + await rounds(fleet, 12)

    added, made = loop(change())
    assert [engine.index for engine in fleet.engines] == [0, 1, 2]
    assert added.stats.tokens_per_second(added.stats.started_at + 60) > 0  # it took part
    assert_right(oracle, models, made)


@pytest.mark.slow  # in a run: test_colocated_run
@pytest.mark.usefixtures("replaced")
def test_sleeping_engines_sample_again_only_once_they_have_both_memories(
    models, oracle, loop, fleet
):
    """A CPU has no memory to give away; what is tested is that vLLM takes the calls in this order,
    and samples nothing in between."""

    async def sleep_and_wake():
        clients = [engine.client for engine in fleet.engines]
        sleeping = []
        await fleet.sleep()
        early = asyncio.ensure_future(sample(fleet))
        for tag in ("weights", "kv_cache"):
            done, _ = await asyncio.wait({early}, timeout=0.5)
            sleeping.append([await client.is_sleeping() for client in clients])
            assert not done
            await asyncio.gather(*(client.wake(tag) for client in clients))
        sleeping.append([await client.is_sleeping() for client in clients])
        fleet.awake.set()
        return sleeping, await early

    sleeping, groups = loop(sleep_and_wake())
    num_engines = len(fleet.engines)
    assert sleeping == [[asleep] * num_engines for asleep in (True, True, False)]
    assert_right(oracle, models, [groups])
