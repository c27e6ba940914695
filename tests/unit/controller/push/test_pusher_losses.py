"""The pusher when a trainer or an engine is lost during a push."""

import asyncio
from array import array
from types import SimpleNamespace

import pytest
from refusals import raised
from small_fleet import SmallFleet, push_result
from torch.distributed import TCPStore

from megatron_r1.base.errors import TrainerLost
from megatron_r1.config.push import PushConfig
from megatron_r1.controller.push.engine_links import EngineLinks
from megatron_r1.controller.push.prober import Prober
from megatron_r1.controller.push.pusher import WeightPusher
from megatron_r1.engines.fleet.engine import Engine
from megatron_r1.engines.server.client import EngineClient
from megatron_r1.engines.server.errors import (
    ConnectionBroken,
    EngineDied,
    EngineError,
    EngineFault,
    WeightsUnavailable,
)
from megatron_r1.engines.server.responses import Response
from megatron_r1.push.control_messages import EngineSetFailure
from megatron_r1.push.matching import EngineLayout
from megatron_r1.trainer.operations import PushOperations


def make_pusher(trainer, fleet, probes=()):
    links = EngineLinks(trainer, PushConfig(), [], EngineLayout())
    return WeightPusher(fleet, links, Prober(trainer, probes, 1e-3, 600))


class TrainerThatIsLost:
    """A trainer that is lost while it connects an engine, once `goes` is set."""

    def __init__(self):
        self.is_connecting, self.goes = asyncio.Event(), asyncio.Event()

    async def call_all(self, operation, on_start=None, **arguments):
        if operation == PushOperations.connect_sets:
            self.is_connecting.set()
            await self.goes.wait()
            raise TrainerLost("trainer rank 0 was killed by signal 9")
        return [push_result(operation)]


@pytest.mark.parametrize("is_closed_first", [True, False])
def test_an_engine_that_is_being_fed_when_the_trainer_is_lost_fails(is_closed_first):
    """With an error after which it is restarted, whether the loss or the end of the session that
    noticed it comes first."""

    async def story():
        trainer = TrainerThatIsLost()
        pusher = make_pusher(trainer, SmallFleet())
        async with pusher.updating_weights():
            await pusher.open()
            await pusher.push(1)
        engine = Engine(0, SimpleNamespace(), EngineClient("http://127.0.0.1:9"))

        async def feed():
            async with pusher.send_weights(engine):
                pytest.fail("it was fed")

        feeding, waiting = asyncio.create_task(feed()), asyncio.create_task(feed())
        await trainer.is_connecting.wait()
        if is_closed_first:
            pusher.close()
        trainer.goes.set()
        with raised(WeightsUnavailable, "engine-0", "rank 0"):
            await feeding
        pusher.close()
        with raised(WeightsUnavailable, "engine-0"):
            await waiting
        await engine.client.close()

    asyncio.run(story())


def test_an_engine_gets_no_weights_after_an_error_between_two_versions():
    async def story():
        pusher = make_pusher(SmallTrainer(), SmallFleet())
        async with pusher.updating_weights():
            await pusher.open()
            await pusher.push(1)

        async def feed():
            async with pusher.send_weights(Engine(0, SimpleNamespace(), SmallClient())):
                pytest.fail("it was fed")

        with raised(TrainerLost, "gone"):
            async with pusher.updating_weights():
                joining = asyncio.create_task(feed())
                await asyncio.sleep(0)
                raise TrainerLost("gone")
        with raised(WeightsUnavailable, "engine-0"):
            await joining

    asyncio.run(story())


class SmallTrainer:
    """A trainer.

    Attributes:
        calls: the calls, (operation, arguments).
        failures: for one send to the first set after another, the members at fault, or None where
            it succeeds."""

    def __init__(self, failures=(), store=1):
        self.failures, self.calls, self.port = list(failures), [], store

    async def call_all(self, operation, on_start=None, **arguments):
        self.calls.append((operation, arguments))
        if on_start:
            on_start()
        failures = {}
        if operation == PushOperations.send_weights and self.failures:
            members = self.failures.pop(0)
            if members is not None:
                failures = {arguments["sets"][0]: EngineSetFailure("Connection reset", members)}
        return [push_result(operation, self.port, failures)]

    def sets(self):
        """Return the engines' numbers in the sets of each call that connects some."""
        return [
            [size for _, size in arguments["sets"]]
            for operation, arguments in self.calls
            if operation == PushOperations.connect_sets
        ]

    async def call(self, operation, **arguments):
        pytest.fail("it was probed")


class SmallClient:
    """generate: raises the next of `faults`, then answers."""

    def __init__(self, *faults):
        self.faults = list(faults)

    async def init_weight_transfer(self, init, resume): ...
    async def swap_weights(self, update, version, resume): ...

    async def generate(self, *arguments, **settings):
        if self.faults:
            raise self.faults.pop(0)
        one = array("i", [7]), array("f", [-0.5]), array("i", [1])
        return [Response(*one, finish_reason="length")]


def feed(trainer, client, probes=()):
    """SendWeights the weights to a new engine."""

    async def story():
        pusher = make_pusher(trainer, SmallFleet(), probes)
        async with pusher.updating_weights():
            await pusher.open()
            await pusher.push(1)
        engine = Engine(3, SimpleNamespace(describe_end=lambda: "?"), client, is_up=False)
        async with pusher.send_weights(engine):
            pass

    asyncio.run(story())


def test_an_engine_that_fails_the_probes_does_not_join(monkeypatch):
    monkeypatch.setattr("megatron_r1.engines.fleet.engine.DEATH_WAIT_SECONDS", 0.0)
    feed(SmallTrainer(), SmallClient())
    broken = SmallClient(ConnectionBroken("cut"))
    with raised(EngineDied, "engine-3", "cut"):
        feed(SmallTrainer(), broken, probes=[[1, 2]])


def test_an_engine_that_the_trainer_could_not_send_to_does_not_join():
    with raised(EngineDied, "engine-3", "Connection reset"):
        feed(SmallTrainer([[0]]), SmallClient())


class RecordingClient(SmallClient):
    """Records the calls that concern an engine's memory, with their arguments."""

    def __init__(self):
        super().__init__()
        self.called = []

    async def init_weight_transfer(self, init, resume):
        self.called.append(("connect", init.allocates_per_push))

    async def swap_weights(self, update, version, resume):
        self.called.append(("swap", resume))

    async def wake(self, tag):
        self.called.append(("wake", tag))

    async def sleep(self):
        self.called.append(("sleep",))

    async def resume(self):
        self.called.append(("resume",))


@pytest.mark.parametrize("colocated", [False, True])
def test_an_engine_on_the_trainer_s_gpu_has_no_cache_while_its_first_weights_arrive(colocated):
    async def story():
        trainer, client = SmallTrainer(), RecordingClient()
        settings = PushConfig(transport="nccl")
        links = EngineLinks(trainer, settings, [], EngineLayout(), colocated=colocated)
        pusher = WeightPusher(SmallFleet(), links)
        async with pusher.updating_weights():
            await pusher.open()
            await pusher.push(1)
        async with pusher.send_weights(Engine(3, SimpleNamespace(), client, is_up=False)):
            return client.called

    called = asyncio.run(story())
    if not colocated:
        assert called == [("connect", False), ("swap", True)]
        return
    assert called == [
        ("connect", True),
        ("sleep",),
        ("wake", "weights"),
        ("swap", False),
        ("wake", "kv_cache"),
        ("resume",),
    ]


def test_the_trainer_forgets_engines_that_are_gone():
    async def story():
        trainer, fleet = SmallTrainer(), SmallFleet(engines(2))
        pusher = make_pusher(trainer, fleet)
        async with pusher.updating_weights():
            await pusher.open()
            await pusher.push(1)
        del fleet.engines[0]
        for version in (2, 3):
            async with pusher.updating_weights():
                await pusher.push(version)
        return [
            (arguments["sets"], arguments["closed_sets"])
            for operation, arguments in trainer.calls
            if operation == PushOperations.send_weights
        ]

    first, second, third = asyncio.run(story())
    assert [len(sets) for sets, _ in (first, second, third)] == [2, 1, 1]
    assert (first[1], second[1], third[1]) == ([], first[0][:1], [])


def engines(count):
    names = SimpleNamespace(describe_end=lambda: "?")
    return [Engine(index, names, SmallClient(), is_up=True) for index in range(count)]


def sharing_pusher(trainer, fleet):
    settings = PushConfig(transport="gloo")
    links = EngineLinks(trainer, settings, [], EngineLayout(), notify=lambda line: None)
    return WeightPusher(fleet, links)


def test_engines_that_join_or_leave_come_into_new_sets():
    async def story():
        trainer, fleet = SmallTrainer(), SmallFleet(engines(34))
        pusher = sharing_pusher(trainer, fleet)
        async with pusher.updating_weights():
            await pusher.open()
            await pusher.push(1)
        first = trainer.sets()
        trainer.calls.clear()
        async with pusher.updating_weights():
            await pusher.push(2)
        none = trainer.sets()
        new = Engine(34, SimpleNamespace(), SmallClient(), is_up=True)
        async with pusher.send_weights(new):
            fleet.engines.append(new)
        fleet.engines.pop(5)
        async with pusher.updating_weights():
            await pusher.push(3)
        return first, none, trainer.sets()

    assert asyncio.run(story()) == ([[11, 11, 12]], [], [[1], [11, 11, 12]])


class TrainerThatConnectsNone(SmallTrainer):
    """Its ranks find one problem with a set of several engines, and another with each alone."""

    async def call_all(self, operation, on_start=None, **arguments):
        (answer,) = await super().call_all(operation, on_start, **arguments)
        if operation == PushOperations.connect_sets:
            problem = "the engine takes no pushes", "receiver/3 is not there"
            for name, size in arguments["sets"]:
                answer.problems[name] = problem[size == 1]
        return [answer]


def test_an_engine_that_cannot_connect_has_the_problem_of_its_set_named_too():
    async def story():
        pusher = sharing_pusher(TrainerThatConnectsNone(), SmallFleet(engines(2)))
        with raised(EngineError, "engine-0", "takes no pushes", "receiver/3"):
            async with pusher.updating_weights():
                await pusher.open()

    asyncio.run(story())


def test_a_full_set_stays_when_another_changes():
    async def story():
        trainer, fleet = SmallTrainer(), SmallFleet(engines(32))
        pusher = sharing_pusher(trainer, fleet)
        async with pusher.updating_weights():
            await pusher.open()
            await pusher.push(1)
        fleet.engines.pop(0)
        async with pusher.updating_weights():
            await pusher.push(2)
        return trainer.sets()

    assert asyncio.run(story()) == [[16, 16], [15]]


def test_a_push_is_repeated_for_the_others_of_a_set_whose_engine_is_lost():
    async def story():
        trainer, fleet = SmallTrainer([[1]]), SmallFleet(engines(3))
        pusher = sharing_pusher(trainer, fleet)
        async with pusher.updating_weights():
            await pusher.open()
            await pusher.push(1)
        sends = [
            a["push_number"]
            for operation, a in trainer.calls
            if operation == PushOperations.send_weights
        ]
        return trainer.sets(), sends, fleet.lost

    sets, sends, lost = asyncio.run(story())
    assert (sets, sends) == ([[3], [2]], [1, 1])
    assert lost == [(1, "engine-1 was lost during a push: Connection reset")]


def test_engines_that_cannot_reach_each_other_get_all_weights_from_the_trainer():
    """A set fails twice, and no engine is at fault: none is restarted."""

    async def story():
        trainer, fleet = SmallTrainer([[], []]), SmallFleet(engines(3))
        pusher = sharing_pusher(trainer, fleet)
        async with pusher.updating_weights():
            await pusher.open()
            await pusher.push(1)
        async with pusher.updating_weights():
            await pusher.push(2)
        return trainer.sets(), fleet.lost

    assert asyncio.run(story()) == ([[3], [3], [1, 1, 1]], [])


def test_engines_of_other_sets_are_taken_from_them_as_well():
    """Failures of two sets: afterwards no engine gets weights from another."""

    async def story():
        trainer, fleet = SmallTrainer([[], None, []]), SmallFleet(engines(32))
        pusher = sharing_pusher(trainer, fleet)
        async with pusher.updating_weights():
            await pusher.open()
            await pusher.push(1)
        for version in (2, 3):
            async with pusher.updating_weights():
                await pusher.push(version)
        return trainer.sets()

    # Those of the set that failed at once, the others with the next push.
    assert asyncio.run(story())[-2:] == [[1] * 16, [1] * 16]


def test_an_engine_that_dies_while_a_set_connects_is_lost_and_the_others_are_not(monkeypatch):
    monkeypatch.setattr("megatron_r1.engines.fleet.engine.DEATH_WAIT_SECONDS", 0.0)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    class Dies(SmallClient):
        async def init_weight_transfer(self, init, resume):
            raise ConnectionBroken("cut")

    async def story():
        trainer, fleet = SmallTrainer(store=store.port), SmallFleet(engines(3))
        fleet.engines[2].client = Dies()
        pusher = sharing_pusher(trainer, fleet)
        async with pusher.updating_weights():
            await pusher.open()
            await pusher.push(1)
        return trainer.sets(), fleet.lost

    sets, lost = asyncio.run(story())
    assert sets == [[3], [2]] and lost == [(2, "engine-2 was lost: cut")]


class ProbingTrainer(SmallTrainer):
    async def probe(self, sequences):
        return 0.0


@pytest.mark.parametrize(
    ("faults", "lost"),
    [
        ([EngineFault("status 500: boom", 500)], []),
        (
            [EngineFault("status 500: boom", 500), EngineFault("no number")],
            [(0, "engine-0 did not answer the probes: no number")],
        ),
    ],
    ids=["once", "again"],
)
def test_a_failed_probe_is_retried_once_and_then_its_engine_is_replaced(faults, lost, monkeypatch):
    monkeypatch.setattr("megatron_r1.engines.fleet.engine.DEATH_WAIT_SECONDS", 0.0)

    async def story():
        fleet = SmallFleet([Engine(0, SimpleNamespace(), SmallClient(*faults))])
        pusher = make_pusher(ProbingTrainer(), fleet, [[1, 2]])
        async with pusher.updating_weights():
            await pusher.open()
            await pusher.push(1)
        assert ("push/probe_diff" in await pusher.probe_results()) == (not lost)
        return fleet.lost

    assert asyncio.run(story()) == lost


@pytest.mark.parametrize("colocated", [False, True])
def test_a_push_does_not_wait_for_probes_that_engines_answer_while_they_sample(colocated):
    """Where they are on the trainer's GPUs it does, as these compute in turns."""

    class Differing(SmallTrainer):
        async def probe(self, sequences):
            return 0.5

    async def story():
        fleet = SmallFleet([Engine(0, SimpleNamespace(), SmallClient())])
        pusher = make_pusher(Differing(), fleet, [[1, 2]])
        pusher.links.colocated = colocated

        async def push():
            async with pusher.updating_weights():
                await pusher.open()
                assert "push/bytes" in await pusher.push(1)

        if not colocated:
            await push()
        with pytest.raises(EngineError, match="differ from the trainer's by 0.5"):
            await (push() if colocated else pusher.probe_results())
        pusher.close()

    asyncio.run(story())


def test_engines_answer_the_probes_at_once():
    """Each waits for the other's request here."""
    met = asyncio.Barrier(2)

    class Waiting(SmallClient):
        async def generate(self, *arguments, **options):
            await met.wait()
            return await super().generate(*arguments, **options)

    async def story():
        fleet = SmallFleet([Engine(i, SimpleNamespace(), Waiting()) for i in range(2)])
        pusher = make_pusher(ProbingTrainer(), fleet, [[1, 2]])
        async with pusher.updating_weights():
            await pusher.open()
            await pusher.push(1)
        return await pusher.probe_results()

    assert asyncio.run(story())["push/probe_diff"] == 0.0


def test_the_timeout_of_an_engine_begins_with_the_trainer_s_turn():
    """Its timeout for finding the trainer's ranks begins with the call in which they connect."""

    class BusyTrainer(SmallTrainer):
        async def call_all(self, operation, on_start=None, **arguments):
            if operation == PushOperations.connect_sets:
                await asyncio.sleep(0.05)
                happened.append("turn")
            return await super().call_all(operation, on_start, **arguments)

    class Joining(SmallClient):
        async def init_weight_transfer(self, init, resume):
            happened.append("clock")

    happened = []
    feed(BusyTrainer(), Joining())
    assert happened == ["turn", "clock"]
