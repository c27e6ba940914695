"""Accepted drafts between two readings of vLLM's counters."""

import asyncio

import pytest

from megatron_r1.engines.fleet.draft_acceptance import AcceptanceMeter
from megatron_r1.engines.server.client import EngineClient
from megatron_r1.engines.server.errors import EngineTimeout

COUNTERS = """# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
vllm:spec_decode_num_drafts_total{{engine="0",model_name="policy"}} {0}.0
vllm:spec_decode_num_drafts_total{{engine="1",model_name="policy"}} {0}.0
vllm:spec_decode_num_draft_tokens_total{{engine="0",model_name="policy"}} {1}.0
vllm:spec_decode_num_draft_tokens_total{{engine="1",model_name="policy"}} {1}.0
vllm:spec_decode_num_accepted_tokens_total{{engine="0",model_name="policy"}} {2}.0
vllm:spec_decode_num_accepted_tokens_total{{engine="1",model_name="policy"}} {2}.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{{engine="0",position="0"}} 99.0
vllm:spec_decode_num_drafts_created{{engine="0",model_name="policy"}} 1.7e+09
"""


class Engine:
    """An engine with two copies, each with these counters; None: it does not answer."""

    is_up = True

    def __init__(self, *counts):
        self.counts = counts
        self.client = EngineClient("http://here")
        self.client.request = self.request

    async def request(self, method, path):
        assert (method, path) == ("GET", "/metrics")
        if self.counts is None:
            raise EngineTimeout("late")
        return COUNTERS.format(*self.counts).encode()


def read(meter, *engines):
    return asyncio.run(meter.read(engines))


def test_a_reading_counts_what_came_since_the_last_one_of_all_engines():
    meter, one, two = AcceptanceMeter(), Engine(10, 20, 5), Engine(0, 0, 0)
    assert read(meter, one, two) == {
        "speculative/acceptance": 0.25,
        "speculative/length": pytest.approx(1.5),
    }
    assert read(meter, one, two) == {}, "nothing was drafted since"
    one.counts, two.counts = (20, 40, 25), (30, 60, 0)
    # 20 of 80 tokens, in 40 drafts, on each of two copies.
    assert read(meter, one, two) == {"speculative/acceptance": 0.25, "speculative/length": 1.5}


def test_an_engine_that_does_not_answer_is_counted_later_and_a_new_one_from_its_start():
    meter, engine = AcceptanceMeter(), Engine(10, 10, 5)
    read(meter, engine)
    engine.counts = None
    assert read(meter, engine) == {}
    engine.counts = (30, 30, 25)
    assert read(meter, engine)["speculative/acceptance"] == 1.0
    assert read(meter, Engine(10, 10, 1))["speculative/acceptance"] == pytest.approx(0.1)


def test_an_engine_that_was_down_counts_from_its_last_reading_or_from_its_new_start():
    meter, engine = AcceptanceMeter(), Engine(10, 10, 5)
    read(meter, engine)
    engine.is_up = False
    assert read(meter, engine) == {}
    engine.is_up, engine.counts = True, (20, 20, 5)
    assert read(meter, engine)["speculative/acceptance"] == 0.0, "10 more, and none accepted"
    engine.counts = (4, 8, 6)
    assert read(meter, engine)["speculative/acceptance"] == 0.75, "a new process counts from 0"


def test_engines_that_are_down_or_have_no_address_yet_are_not_asked():
    down, starting, engine = Engine(50, 50, 50), Engine(50, 50, 50), Engine(10, 10, 5)
    down.is_up = False
    starting.client.url = ""
    assert read(AcceptanceMeter(), down, starting, engine)["speculative/acceptance"] == 0.5
