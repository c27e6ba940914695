"""What is said of a set of engines that cannot connect."""

import asyncio
import json
from types import SimpleNamespace

import msgspec
import pytest

from megatron_r1.config.push import PushConfig
from megatron_r1.controller.push.engine_links import EngineLinks, EngineSet
from megatron_r1.engines.fleet.engine import Engine
from megatron_r1.engines.server.errors import EngineFault
from megatron_r1.push.control_messages import (
    AdapterSettings,
    ConnectedSets,
    PushUpdateInfo,
    StoreUnreachable,
)
from megatron_r1.push.matching import EngineLayout


class Trainer:
    """A trainer whose ranks do not find the engine."""

    async def call_all(self, operation, on_start, sets, **arguments):
        on_start()
        problems = {name: "wait timeout after 120000ms, keys: receiver/0" for name, _ in sets}
        return [ConnectedSets(problems, {}, {})]


@pytest.mark.more
@pytest.mark.parametrize(
    ("said", "named"),
    [
        (str(StoreUnreachable("10.0.0.1:4711 was not reached")), "10.0.0.1:4711"),
        ("no", "receiver/0"),
    ],
)
def test_an_engine_that_does_not_reach_the_store_names_it(said, named):
    """The trainer's ranks know only that they have heard nothing from the engine."""

    class Client:
        async def init_weight_transfer(self, init, resume):
            raise EngineFault(f"status 500: Worker failed with error '{said}'", 500)

    async def story():
        links = EngineLinks(Trainer(), PushConfig(), [], EngineLayout())
        engine = Engine(0, SimpleNamespace(), Client(), is_up=True)
        return await links.connect([EngineSet("one", [engine])], resume=True)

    problems, deaths = asyncio.run(story())
    assert named in problems["one"] and deaths == {}


def parse(kind, fields):
    """Return the message that the plugin reads out of what vLLM hands over."""
    from megatron_r1.engines.plugin.backend import PushTransferEngine

    engine = object.__new__(PushTransferEngine)
    return getattr(engine, f"parse_{kind}_info")(fields)


def test_an_engine_reads_what_it_is_sent():
    """The JSON is the contract between the controller and a server with our plugin."""
    sent = []

    class Client:
        async def init_weight_transfer(self, init, resume):
            sent.append(init)

    async def story():
        settings = PushConfig(timeout_seconds=123.0)
        adapter = AdapterSettings("base_model.", {"r": 8})
        tensors = [["head.weight", [4, 2]]]
        links = EngineLinks(Trainer(), settings, tensors, EngineLayout(), adapter=adapter)
        links.store = "10.0.0.1", 4711
        engine = Engine(0, SimpleNamespace(), Client(), is_up=True)
        await links.connect([EngineSet("one", [engine])], resume=True)

    asyncio.run(story())
    fields = json.loads(msgspec.json.encode(sent[0]))
    assert fields == {
        "store": ["10.0.0.1", 4711],
        "name": "one",
        "member_index": 0,
        "num_members": 1,
        "tensors": [["head.weight", [4, 2]]],
        "timeout_seconds": 120.0,
        "push_timeout_seconds": 123.0,
        "allocates_per_push": False,
        "adapter": {"prefix": "base_model.", "config": {"r": 8}},
    }
    assert parse("init", fields) == sent[0]
    assert parse("update", {"push_number": 3, "timeout_seconds": 5}) == PushUpdateInfo(3, 5.0)


@pytest.mark.parametrize(
    ("kind", "fields", "named"),
    [
        ("init", {"name": "one", "tensors": []}, "PushInitInfo.*`store`"),
        (
            "init",
            {"store": ["a", 1], "name": "one", "tensors": [["w", 4]]},
            r"array.*int.*tensors",
        ),
        ("update", {"push_number": 1, "number": 1}, "PushUpdateInfo.*unknown field `number`"),
        ("update", {"push_number": "1"}, "int.*str.*push_number"),
    ],
)
def test_a_message_of_another_form_is_refused_by_the_field(kind, fields, named):
    with pytest.raises(ValueError, match=named):
        parse(kind, fields)
