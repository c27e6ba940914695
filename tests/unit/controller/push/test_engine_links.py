"""What is said of a set of engines that cannot connect."""

import asyncio
from types import SimpleNamespace

import pytest

from megatron_r1.config.push import PushConfig
from megatron_r1.controller.push.engine_links import EngineLinks, EngineSet
from megatron_r1.engines.fleet.engine import Engine
from megatron_r1.engines.server.errors import EngineFault
from megatron_r1.push.results import StoreUnreachable


class Trainer:
    """A trainer whose ranks do not find the engine."""

    async def call_all(self, operation, on_start, sets, **arguments):
        on_start()
        problems = {name: "wait timeout after 120000ms, keys: receiver/0" for name, _ in sets}
        return [{"problems": problems, "num_links": {}, "num_bytes": {}}]


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
        links = EngineLinks(Trainer(), PushConfig(), [], {})
        engine = Engine(0, SimpleNamespace(), Client(), is_up=True)
        return await links.connect([EngineSet("one", [engine])], resume=True)

    problems, deaths = asyncio.run(story())
    assert named in problems["one"] and deaths == {}


def test_an_engine_is_sent_the_fields_that_its_plugin_reads():
    """vLLM passes the message to the plugin's class by keyword."""
    from megatron_r1.engines.plugin.backend import PushInitInfo

    read = []

    class Client:
        async def init_weight_transfer(self, init, resume):
            read.append(PushInitInfo(**init))

    async def story():
        settings = PushConfig(timeout_seconds=123.0)
        links = EngineLinks(Trainer(), settings, [["head.weight", [4, 2]]], {})
        engine = Engine(0, SimpleNamespace(), Client(), is_up=True)
        await links.connect([EngineSet("one", [engine])], resume=True)

    asyncio.run(story())
    (info,) = read
    assert (info.name, info.member_index, info.num_members) == ("one", 0, 1)
    assert info.push_timeout_seconds == 123.0 and info.tensors == [["head.weight", [4, 2]]]
