"""Two real engines of two ranks each that receive a push as a set, over gloo: each slice enters one
of them and is passed on to the other. One is then killed, between pushes and amid one.

Oracle: the engines' own checksums of what they compute with when they have started on the weights.
"""

import os
import signal
import threading

import pytest
from engine_checksums import checksums
from file_trainer import FilePusher
from tiny_models import DEEPSEEK, write_model
from waiting import until

from megatron_r1.engines.fleet.engine_fleet import EngineFleet
from megatron_r1.push.transports.payloads import LinkPayload

pytestmark = pytest.mark.more  # in `make test` the rehearsal of r1_zero pushes through sets
LAYOUT = {"tensor_parallel": 2, "expert_parallel": True}
ENGINES = {"max_model_len": 64, "max_num_seqs": 8, "num_threads": 1, "max_restarts": 2}
BACKEND = {"weight_transfer_backend": "megatron_r1_gloo"}


@pytest.fixture(scope="module")
def models(tmp_path_factory, oracle):
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("ab"):
        oracle(write_model, folder / name, DEEPSEEK, seed)
    return folder


@pytest.fixture(scope="module")
def fleet(models, loop, tmp_path_factory):
    fleet = EngineFleet(2, tmp_path_factory.mktemp("logs"), **ENGINES, **LAYOUT, **BACKEND)
    loop(fleet.start(models / "a"))
    yield fleet
    loop(fleet.close())


@pytest.fixture(scope="module")
def pusher(fleet):
    return FilePusher(DEEPSEEK, fleet, layout=LAYOUT, transport="gloo")


@pytest.fixture(scope="module")
def expected(loop, fleet):
    """The checksums of weights `a`, on which both engines start."""
    first, second = (loop(checksums(fleet, engine)) for engine in (0, 1))
    assert first == second
    return first


def both(loop, fleet):
    return [loop(checksums(fleet, engine)) for engine in (0, 1)]


def sizes(pusher):
    return sorted(len(one.engines) for one in pusher.pusher.links.sets)


def test_each_slice_enters_one_engine_and_both_have_all(loop, models, fleet, pusher, expected):
    loop(pusher.push(models / "b"))
    assert expected not in both(loop, fleet)
    loop(pusher.push(models / "a"))
    assert both(loop, fleet) == [expected] * 2
    assert sizes(pusher) == [2]
    (one,) = pusher.trainer.sender._sets.values()
    need = {
        link.sender.engine_rank: sum(
            slot.height * slot.width * 4 for slot in link.sender.table.slots
        )
        for link in one.links
    }
    assert one.num_bytes == sum(need.values())
    for engine in (0, 1):
        ends = [link.sender for link in one.links if link.member == engine]
        entered = sum(each.num_bytes(end.table) for end in ends for each in end.chunks)
        assert 0.4 < entered / sum(need.values()) < 0.6


async def until_replaced(fleet):
    await until(lambda: not fleet.replacer.tasks and len(fleet.state.up) == 2)


def kill(engine):
    os.kill(engine.server.process.pid, signal.SIGKILL)


@pytest.mark.parametrize(
    "amid",
    [
        pytest.param(False, id="between pushes", marks=pytest.mark.slow),
        pytest.param(True, id="amid a push"),
    ],
)
def test_an_engine_that_dies_does_not_take_the_other_with_it(
    amid, loop, models, fleet, pusher, expected, monkeypatch
):
    loop(pusher.push(models / "b"))
    left, dies = fleet.engines
    restarts, packed, dying = fleet.num_restarts, LinkPayload.pack, []
    lock = threading.Lock()

    def kill_at_second(*arguments):
        with lock:
            dying.append(1)
            if len(dying) == 2:
                kill(dies)
        return packed(*arguments)

    if amid:
        monkeypatch.setattr(LinkPayload, "pack", kill_at_second)
    else:
        kill(dies)

    loop(pusher.push(models / "a"))
    assert fleet.state.up[0] is left and left.server.is_alive()
    assert loop(checksums(fleet, fleet.engines.index(left))) == expected
    loop(until_replaced(fleet))
    assert both(loop, fleet) == [expected] * 2
    assert fleet.num_restarts == restarts + 1
    loop(pusher.push(models / "b"))
    loop(pusher.push(models / "a"))
    assert both(loop, fleet) == [expected] * 2 and sizes(pusher) == [2]
