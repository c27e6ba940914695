"""Which engine gets which group, expected lengths, and which engine counts as slow: without any
engine, in an order that does not depend on time."""

import asyncio
import re

import pytest

from megatron_r1.engines.fleet.dispatch import Affinity, DispatchedRequest, Dispatcher
from megatron_r1.engines.fleet.engine import Engine
from megatron_r1.engines.fleet.response_length_estimates import ExpectedLength, LengthEstimator
from megatron_r1.engines.fleet.service_stats import ServedGroup, ServiceStats, find_slow
from megatron_r1.engines.server.errors import EngineError


def request(n=1, mean=100.0, longest=100.0, step=0, num_prompt_tokens=0, known=8, avoid=()):
    return DispatchedRequest(
        n, num_prompt_tokens, ExpectedLength(mean, longest, known), step, set(avoid)
    )


def turn(affinity, num_prompt_tokens=1000):
    return DispatchedRequest(1, num_prompt_tokens, ExpectedLength(10.0, 10.0, 8), affinity=affinity)


class Scene:
    """A dispatcher whose events the test causes; `places` lists (engine, name of the request)."""

    def __init__(self, capacity, num_engines):
        self.dispatcher = Dispatcher(capacity)
        self.engines = [Engine(index, None, None) for index in range(num_engines)]
        self.places, self.tasks = [], {}

    def open(self, *indices):
        self.dispatcher.set_engines(self.engines[index] for index in indices)

    def request(self, name, what):
        async def wait():
            engine = await self.dispatcher.acquire(what)
            self.places.append((engine.index, name))

        self.tasks[name] = asyncio.create_task(wait())

    def engines_of(self, *names):
        given = {name: index for index, name in self.places}
        return [given.get(name) for name in names]


async def settle():
    for _ in range(4):
        await asyncio.sleep(0)


def run(story):
    return asyncio.run(story())


def test_longest_first_and_earlier_batches_before_later_ones():
    async def story():
        scene = Scene(capacity=4, num_engines=1)
        scene.open(0)
        for name, longest, step in [("b", 50, 1), ("x", 900, 2), ("a", 70, 1), ("c", 10, 1)]:
            scene.request(name, request(n=4, mean=longest, longest=longest, step=step))
        while len(scene.places) < 4:
            await settle()
            scene.dispatcher.release(scene.engines[0], request(n=4))
        return [name for _, name in scene.places]

    assert run(story) == ["a", "b", "c", "x"]


def test_engines_get_equal_work_not_equal_numbers_of_groups():
    async def story():
        scene = Scene(capacity=100, num_engines=2)
        scene.open(0, 1)
        scene.request("long", request(mean=1000, longest=1000))
        for i in range(10):
            scene.request(f"short{i}", request(mean=100, longest=100))
        await settle()
        return [[e.tokens_expected, e.num_running] for e in scene.engines]

    assert run(story) == [[1000, 1], [1000, 10]]


def test_prompts_count_for_less_than_responses_and_once_for_a_group():
    assert request(n=4, num_prompt_tokens=1000, mean=50).cost_tokens == 100 + 4 * 50


def test_an_engine_gets_a_little_more_than_it_can_decode_and_the_rest_waits():
    async def story():
        scene = Scene(capacity=8, num_engines=2)
        scene.open(0, 1)
        for i in range(30):
            scene.request(i, request())
        await settle()
        running = [engine.num_running for engine in scene.engines]
        scene.dispatcher.release(scene.engines[1], request())
        await settle()
        return running, 30 - len(scene.places), scene.places[-1][0]

    assert run(story) == ([10, 10], 9, 1)  # 8 and a quarter; what is freed is filled


def test_a_group_whose_longest_is_far_longer_than_its_mean_leaves_room_for_others():
    """16 sequences of 32 tokens, the longest of 128: 4 of them run on average."""
    assert request(n=16, mean=32, longest=128).mean_occupied_slots == 4
    assert request(n=16, mean=32, longest=32).mean_occupied_slots == 16
    assert request(n=2, mean=1, longest=1000).mean_occupied_slots == 1
    assert request(n=16, known=0).mean_occupied_slots == 8


def test_a_group_larger_than_an_engine_is_not_left_waiting():
    async def story():
        scene = Scene(capacity=2, num_engines=1)
        scene.open(0)
        scene.request("big", request(n=64))
        scene.request("next", request(n=1))
        await settle()
        first = list(scene.places)
        scene.dispatcher.release(scene.engines[0], request(n=64))
        await settle()
        return first, scene.places

    assert run(story) == ([(0, "big")], [(0, "big"), (0, "next")])


def test_a_closed_engines_share_goes_to_the_others_and_a_new_one_takes_part():
    async def story():
        scene = Scene(capacity=4, num_engines=3)
        scene.open(0, 1)
        for i in range(14):
            scene.request(i, request())
        await settle()
        scene.open(1, 2)
        await settle()
        return [engine.num_running for engine in scene.engines]

    assert run(story) == [5, 5, 4]


def test_what_failed_on_an_engine_waits_for_another_and_goes_first_there():
    async def story():
        scene = Scene(capacity=4, num_engines=2)
        scene.open(0, 1)
        full = request(n=8)
        scene.engines[1].num_occupied = 8
        scene.request("again", request(avoid=[scene.engines[0]]))
        scene.request("new", request(longest=5000))
        await settle()
        before = scene.engines_of("again", "new")
        scene.dispatcher.release(scene.engines[1], full)
        await settle()
        after = scene.engines_of("again")
        scene.open(0)  # the only one left
        scene.request("once more", request(avoid=[scene.engines[0]]))
        await settle()
        return before, after, scene.engines_of("once more")

    assert run(story) == ([None, 0], [1], [0])


def test_what_is_asked_for_again_goes_before_what_is_new():
    async def story():
        scene = Scene(capacity=1, num_engines=2)
        scene.engines[1].num_occupied = 2
        scene.open(0, 1)
        scene.request("new", request(n=2, longest=5000))
        scene.request("again", request(n=2, avoid=[scene.engines[1]]))
        await settle()
        return scene.places

    assert run(story) == [(0, "again")]


def test_cancelled_requests_leave_no_load_behind():
    async def story():
        scene = Scene(capacity=1, num_engines=1)
        scene.open(0)
        for name in ("runs", "gives up waiting", "gives up when granted", "granted"):
            scene.request(name, request(n=2))
        await settle()
        scene.tasks["gives up waiting"].cancel()
        await settle()
        scene.dispatcher.release(scene.engines[0], request(n=2))
        await asyncio.sleep(0)  # granted, but its task has not run yet
        scene.tasks["gives up when granted"].cancel()
        await settle()
        return scene.places, scene.engines[0].num_running

    assert run(story) == ([(0, "runs"), (0, "granted")], 2)


def test_when_the_fleet_breaks_waiting_requests_fail():
    async def story():
        scene = Scene(capacity=1, num_engines=1)
        scene.request("waits", request())
        await settle()
        scene.dispatcher.fail(EngineError("all is lost"))
        await scene.tasks["waits"]

    with pytest.raises(EngineError, match="all is lost"):
        run(story)


def test_lengths_are_learned_by_kind_and_size_of_the_prompt():
    lengths = LengthEstimator()
    assert lengths.estimate("math", 10, 400) == ExpectedLength(200, 400)
    for _ in range(4):
        lengths.add("math", 10, [100, 300])
        lengths.add("math", 1000, [1000, 3000])
    expected = lengths.estimate("math", 12, 4000)
    assert (expected.mean, expected.longest) == (200, 300)
    assert lengths.estimate("math", 900, 4000).longest == 3000
    assert lengths.estimate("code", 10, 4000).mean == pytest.approx(1100)  # as all together
    lengths.add("code", 10, [1100])  # one group shows little
    assert lengths.estimate("code", 10, 4000).longest > 1500
    assert lengths.estimate("math", 900, 500).longest == 500  # no more than the limit


def test_lengths_follow_a_policy_that_writes_more_and_more():
    lengths = LengthEstimator()
    for length in [100] * 200 + [1000] * 200:
        lengths.add("math", 10, [length])
    assert 950 < lengths.estimate("math", 10, 4000).mean <= 1000


def stats(answers, window=100.0):
    """Return the stats of an engine.

    Args:
        answers: (seconds, tokens, longest) of each, evenly over the window that ends at 100.
        window: the seconds that count."""
    served = ServiceStats(0.0, window)
    for i, (seconds, tokens, longest) in enumerate(answers):
        served.add(ServedGroup(100.0 * (i + 1) / len(answers), seconds, tokens, longest))
    return served


NORMAL = [(10.0, 1000, 200)] * 20


@pytest.mark.parametrize(
    ("suspect", "is_slow"),
    [
        ([(10.0, 200, 40)] * 20, True),
        ([(10.0, 1000, 40)] * 20, False),  # many sequences at once, so each is slow
        ([(10.0, 200, 200)] * 20, False),  # it had little to do
        ([(10.0, 400, 80)] * 20, False),  # 0.4 of the others
        ([(10.0, 200, 40)] * 7, False),  # too few to compare
    ],
)
def test_an_engine_is_slow_when_its_sequences_and_its_total_are(suspect, is_slow):
    all_stats = {"a": stats(NORMAL), "b": stats(suspect), "c": stats(NORMAL)}
    slow = find_slow(all_stats, 100.0)
    assert list(slow) == (["b"] if is_slow else [])
    assert not is_slow or re.search("4 .*20", slow["b"])


def test_no_engine_is_slow_alone_or_before_a_whole_window():
    crawling = stats([(10.0, 200, 40)] * 20)
    assert find_slow({"b": crawling}, 100.0) == {}
    assert find_slow({"a": stats(NORMAL, window=200.0), "b": crawling}, 100.0) == {}
    assert list(find_slow({"a": stats(NORMAL), "b": crawling}, 100.0)) == ["b"]
    assert find_slow({"a": stats(NORMAL), "b": crawling}, 1000.0) == {}  # long ago


def test_three_unusable_answers_of_the_last_hundred_are_many():
    served = ServiceStats(0.0, 100.0)
    assert [served.add_fault(), served.add_fault()] == [False, False]
    for i in range(98):
        served.add(ServedGroup(float(i), 1.0, 1, 1))
    assert served.add_fault() is False  # the first is forgotten
    assert served.add_fault() is False  # and the second
    assert served.add_fault() is True


def test_tokens_per_second_are_those_of_the_last_minute():
    served = ServiceStats(0.0, 300.0)
    served.add(ServedGroup(10.0, 5.0, 400, 40))
    assert served.tokens_per_second(20.0) == 20.0
    served.add(ServedGroup(100.0, 5.0, 600, 40))
    assert served.tokens_per_second(120.0) == 10.0


def test_turns_go_where_their_beginning_is_unless_that_engine_has_much_more_to_do():
    async def story():
        scene = Scene(capacity=64, num_engines=3)
        scene.open(0, 1, 2)
        origin = Affinity()
        first, second, stranger = Affinity(origin=origin), Affinity(origin=origin), Affinity()
        scene.request("first", turn(first))
        scene.request("stranger", turn(stranger))
        scene.request("second", turn(second, num_prompt_tokens=3000))
        await settle()
        assert scene.engines_of("first", "stranger", "second") == [0, 1, 0]
        scene.dispatcher.release(scene.engines[1], turn(stranger))
        scene.request("stranger, turn 2", turn(stranger))
        await settle()
        assert scene.engines_of("stranger, turn 2") == [1]
        scene.engines[0].tokens_expected += 10_000  # long answers of others
        scene.request("first, turn 2", turn(first))
        await settle()
        scene.request("first, turn 3", turn(first))
        await settle()
        return scene.engines_of("first, turn 2", "first, turn 3")

    assert run(story) == [2, 2]
