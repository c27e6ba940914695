"""Engines that compute in the memory of the trainer's weights: who has it at which time."""

import asyncio
from array import array
from types import SimpleNamespace

import pytest
from refusals import refused
from small_fleet import SmallFleet, push_result

from megatron_r1.base.errors import Cause
from megatron_r1.config import parse_recipe
from megatron_r1.config.push import PushConfig
from megatron_r1.controller.policy_engines import PolicyEngines
from megatron_r1.controller.push.engine_links import EngineLinks
from megatron_r1.controller.push.prober import OffloadedProber
from megatron_r1.controller.push.pusher import WeightPusher
from megatron_r1.engines.fleet.engine import Engine
from megatron_r1.engines.server.errors import EngineError
from megatron_r1.push.matching import EngineLayout
from megatron_r1.trainer.operations import needs_parameters


class OffloadedTrainer:
    """The trainer, and everything that happens, in order: a call that needs weights while engines
    have their memory is refused, as `TrainerClient` does."""

    def __init__(self, difference=0.0):
        self.done, self.is_offloaded, self.difference = [], lambda: False, difference

    def protect_offloaded_weights(self, is_offloaded):
        self.is_offloaded = is_offloaded

    def did(self, operation, **arguments):
        if needs_parameters(operation):
            assert not self.is_offloaded(), operation
        self.done.append(
            operation if not arguments else f"{operation} {arguments['free_parameters']}"
        )

    async def call(self, operation, **arguments):
        self.did(operation.__name__, **arguments)

    async def call_all(self, operation, on_start=None, **arguments):
        self.did(operation.__name__)
        if on_start:
            on_start()
        return [push_result(operation)]

    async def prepare_probe(self, token_sequences):
        self.did("prepare_probe")
        self.token_sequences = token_sequences

    async def compare_probe(self, token_sequences, logprobs):
        self.did("compare_probe")
        assert token_sequences == self.token_sequences
        assert [len(s) for s in logprobs] == [len(ids) - 1 for ids in token_sequences]
        return self.difference


class Client:
    def __init__(self, done):
        self.done = done

    async def init_weight_transfer(self, init, resume):
        assert not resume, "it would compute in the trainer's memory"
        self.done.append("connect")

    async def swap_weights(self, update, version, resume):
        self.done.append("swap")

    async def wake(self, tag):
        self.done.append(f"wake {tag}")

    async def sleep(self):
        self.done.append("sleep")

    async def resume(self):
        self.done.append("resume")

    async def compute_logprobs(self, token_ids, first):
        self.done.append("compute_logprobs")
        return array("f", [-1.0] * (len(token_ids) - first))


class Fleet(SmallFleet):
    """Swaps and sleeps as `EngineFleet`, without the calls to its engines."""

    def __init__(self, done, engines=()):
        super().__init__(engines)
        self.done = done

    async def swap_weights(self, update, version):
        self.done.append(f"fleet has {version}")
        self.awake.set()

    async def sleep(self):
        if self.awake.is_set():
            self.done.append("fleet sleeps")
            self.awake.clear()


def offloading(trainer, fleet):
    links = EngineLinks(trainer, PushConfig(transport="nccl"), [], EngineLayout(), colocated=True)
    prober = OffloadedProber(trainer, [[1, 2, 3], [9]], 1e-3, 600)
    return WeightPusher(fleet, links, prober, offloads=True)


async def pushed(pusher, fleet):
    await fleet.sleep()
    async with pusher.updating_weights():
        await pusher.open()
        del fleet.done[:]
        await pusher.push(1)


def test_the_trainer_computes_the_probes_and_goes_before_the_engines_wake():
    async def story():
        trainer = OffloadedTrainer()
        engine = Engine(0, SimpleNamespace(), Client(trainer.done))
        fleet = Fleet(trainer.done, [engine])
        await pushed(offloading(trainer, fleet), fleet)
        assert trainer.is_offloaded()
        return trainer.done

    assert asyncio.run(story()) == [
        "send_weights",
        "prepare_probe",
        "free_memory True",
        "fleet has 1",
        "compute_logprobs",
        "compare_probe",
    ]


def test_engines_that_compute_something_else_end_the_run():
    async def story():
        trainer = OffloadedTrainer(difference=0.5)
        fleet = Fleet(trainer.done, [Engine(0, SimpleNamespace(), Client(trainer.done))])
        await pushed(offloading(trainer, fleet), fleet)

    with pytest.raises(EngineError, match="differ from the trainer's by 0.5"):
        asyncio.run(story())


def join(others: int) -> tuple[bool, list[str]]:
    """Whether an engine that joins gets weights, and what happens meanwhile."""

    async def story():
        trainer = OffloadedTrainer()
        made = [Engine(i, SimpleNamespace(), Client(trainer.done)) for i in range(others)]
        fleet = Fleet(trainer.done, made)
        pusher = offloading(trainer, fleet)
        await pushed(pusher, fleet)
        del trainer.done[:]
        new = Engine(7, SimpleNamespace(), Client(trainer.done), is_up=False)
        async with pusher.send_weights(new) as has_weights:
            return has_weights, trainer.done

    return asyncio.run(story())


def test_an_engine_that_joins_while_others_sample_sleeps_until_the_next_push():
    assert join(others=1) == (False, ["sleep"])


def test_one_that_joins_when_all_have_died_gets_its_weights_and_then_the_memory():
    has_weights, done = join(others=0)
    assert has_weights and done == [
        "sleep",
        "connect_sets",
        "connect",
        "send_weights",
        "prepare_probe",
        "free_memory True",
        "wake weights",
        "swap",
        "wake kv_cache",
        "resume",
        "compute_logprobs",
        "compare_probe",
    ]


def test_a_checkpoint_has_the_memory_and_engines_their_weights_before_the_next_rollout():
    async def story():
        trainer = OffloadedTrainer()
        fleet = Fleet(trainer.done, [Engine(0, SimpleNamespace(), Client(trainer.done))])
        pusher = offloading(trainer, fleet)
        step_sampler = Sampler(trainer.done, fleet)
        engines = PolicyEngines(trainer, pusher, step_sampler)
        await pushed(pusher, fleet)
        del trainer.done[:]
        async with engines.free_for_trainer():
            trainer.did("save_checkpoint")
        await engines.rollout(2)
        await engines.rollout(3)
        return trainer.done

    again = ["send_weights", "prepare_probe", "free_memory True", "fleet has 1", "compute_logprobs"]
    assert asyncio.run(story()) == [
        *("fleet sleeps", "save_checkpoint", "free_memory False", *again, "compare_probe"),
        *("rollout 2", "rollout 3"),
    ]


class Sampler:
    def __init__(self, done, fleet):
        self.config = parse_recipe({"rollout": {"colocated": True}})
        self.collector, self.done = SimpleNamespace(fleet=fleet), done

    def ensure_started(self, step):
        self.done.append(f"rollout {step}")

    async def wait_for_step(self, step):
        return SimpleNamespace(rollout=step)

    def prefetch(self, version): ...
    def flush_buffered(self): ...


@pytest.mark.parametrize(
    ("key", "recipe"),
    [
        ("parallel.offload_between_phases", {"rollout": {"colocated": False}}),
        ("parallel.offload_between_phases", {"parallel": {"optimizer_offload": 0.5}}),
        ("parallel.offload_folder", {"parallel": {"offload_folder": "/tmp"}}),
    ],
)
def test_settings_that_do_not_go_with_it_are_refused(key, recipe):
    tree = {"rollout": {"colocated": True}} | recipe
    tree["parallel"] = {"offload_between_phases": "host"} | recipe.get("parallel", {})
    with refused(key, Cause.CONFLICT):
        parse_recipe(tree)
