"""Environments of one's own: schemas, mistakes, and processes that hang or end."""

import asyncio
import functools
import inspect
import json
import signal
import socket

import pytest
from liveness import wait_until_dead
from pydantic import TypeAdapter
from r1_grading.base.workers import LENGTH_HEADER
from refusals import refused
from transformers.utils import get_json_schema
from waiting import until

from megatron_r1.agents import environment_pool, environment_server, method_arguments
from megatron_r1.agents.environment import EnvironmentDescription, describe_environment
from megatron_r1.agents.environment_pool import (
    EnvironmentFailed,
    EnvironmentPool,
    EnvironmentProcess,
    ToolCallTimeout,
    describe_in_subprocess,
)
from megatron_r1.agents.shipped_environments import Calculator
from megatron_r1.base.errors import Cause
from megatron_r1.config import AgentsConfig
from tests.unit.agents import own_environments as own

MODULE = "tests.unit.agents.own_environments"
LONG = 10_000.0
"""Seconds that only what hangs reaches."""


def play(use, name=f"{MODULE}:Counter", seconds=LONG, **options):
    """Run use(environments) and close them."""

    async def run():
        settings = AgentsConfig(environment=name, parameters=options, call_seconds=seconds)
        environments = EnvironmentPool(settings, EnvironmentDescription([], True))
        try:
            return await use(environments)
        finally:
            await environments.close()

    return asyncio.run(run())


def test_what_a_class_prepares_is_done_once_before_the_first_episode(tmp_path):
    async def use(environments):
        async with environments.open() as first, environments.open() as second:
            before = prepared.read_text()
            return before, [await game.reset({"question": "?"}) for game in (first, second)]

    prepared = tmp_path / "prepared"
    once = "prepared "
    assert play(use, f"{MODULE}:Prepared", path=str(prepared)) == (once, [once] * 2)


def test_the_index_of_retrieval_is_written_before_an_episode_s_time_begins(tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"title": "a", "text": "b"}')

    async def use(environments):
        async with environments.open():
            return corpus.with_name("corpus.jsonl.fts5").exists()

    assert play(use, "retrieval", corpus=str(corpus))


def test_a_corpus_that_cannot_be_read_is_an_error_of_the_first_episode(tmp_path):
    async def use(environments):
        async with environments.open() as game:
            with pytest.raises(EnvironmentFailed, match="gone.jsonl"):
                await game.reset({"question": "?"})

    play(use, "retrieval", corpus=str(tmp_path / "gone.jsonl"))


def test_schemas_are_those_of_transformers_where_arguments_are_documented():
    def fail(reason: str) -> None:
        """Raise.

        Args:
            reason: of the error.
        """

    schemas = {tool["function"]["name"]: tool for tool in describe_environment(own.Counter).tools}
    expected = get_json_schema(fail)["function"]
    del expected["return"]  # not in OpenAI's form
    assert schemas["fail"]["function"] == expected
    assert schemas["add"]["function"] == {
        "name": "add",
        "description": "Add to the counter.",
        "parameters": {
            "type": "object",
            "properties": {"number": {"type": "integer"}, "times": {}},
            "required": [],
        },
    }
    assert set(schemas) == {"add", "fail", "shout", "sleep", "wait", "stuck", "crash"}
    [calculate] = describe_environment(Calculator).tools
    assert calculate["function"]["parameters"]["required"] == ["expression"]
    assert [describe_environment(c).has_reward for c in (own.Counter, own.Ungrading)] == [
        True,
        False,
    ]


@pytest.mark.parametrize(
    ("name", "cause", "shown"),
    [
        ("calculatr", Cause.UNKNOWN, ("'calculatr'", "'calculator'")),
        (f"{MODULE}:Countr", Cause.NOT_FOUND, ("Countr", "'Counter'")),
        ("nowhere.at_all:Game", Cause.NOT_FOUND, ("'nowhere'",)),
    ],
)
def test_an_unknown_environment_is_named(name, cause, shown):
    with refused("agents.environment", cause, *shown):
        describe_in_subprocess(name)


def test_a_class_that_is_no_environment_is_refused():
    with refused("agents.environment", Cause.EMPTY, "NoTools", "reset, get_reward"):
        describe_environment(own.NoTools)
    with refused("agents.environment", Cause.MISSING, "NoReset", "reset"):
        describe_environment(own.NoReset)
    with refused("agents.environment", Cause.CONFLICT, "DoneMethod.done"):
        describe_environment(own.DoneMethod)


def test_an_episode_with_coroutines_options_errors_and_an_end():
    async def use(environments):
        async with environments.open() as game:
            assert await game.reset({"question": "?", "truth": 3, "other": 1}) == "Count to 3."
            result = await game.call("add", {"number": 2}, LONG)
            assert (result.text, result.is_error, result.is_done) == (
                '{"total": 4, "note": "é"}',
                False,
                False,
            )
            result = await game.call("fail", {"reason": "lone \ud800"}, LONG)
            assert (result.text, result.is_error) == ("error: RuntimeError: lone \ud800", True)
            for arguments in ({"numbr": 1}, [1], None):
                assert (await game.call("add", arguments, LONG)).text.startswith(
                    "error: TypeError: "
                )
            assert not (await game.call("shout", {}, LONG)).is_error
            assert await game.reward("") == 1.0
            assert (await game.call("add", {"number": 99}, LONG)).is_done
        async with environments.open() as again:  # the same process, another instance
            await again.reset({"question": "?"})
            assert await again.reward("") == 0.0

    play(use, step=2)


def test_failures_of_reset_and_get_reward_and_of_the_machine_are_the_environments():
    async def use(environments):
        async with environments.open() as game:
            with pytest.raises(EnvironmentFailed, match="reset: OSError"):
                await game.reset({"question": "?", "broken": True})
            await game.reset({"question": "?"})
            await game.call("add", {"number": 13}, LONG)
            with pytest.raises(EnvironmentFailed, match="get_reward: ValueError: 13"):
                await game.reward("")
            with pytest.raises(EnvironmentFailed, match="fail: RunError"):
                await game.call("fail", {"reason": "the machine"}, LONG)

    play(use)


def test_a_method_that_hangs_is_interrupted_and_its_environment_goes_on(monkeypatch):
    monkeypatch.setattr(environment_server, "GRACE_SECONDS", LONG)
    hanging = [("call", [name, {"seconds": LONG}], 0.5) for name in ("sleep", "wait")]
    row = {"question": "?"}
    calls = [("reset", [row], LONG), *hanging, ("call", ["add", {}], LONG)]
    ours, theirs = socket.socketpair()
    before = signal.getsignal(signal.SIGALRM)
    with ours, theirs, ours.makefile("rb") as stream:
        for method, arguments, seconds in calls:
            message = {"method": method, "arguments": arguments, "seconds": seconds}
            ours.sendall(environment_server.encode_frame(message))
        ours.shutdown(socket.SHUT_WR)
        try:
            environment_server._Episode(own.Counter, {}, theirs).serve()
        finally:
            signal.signal(signal.SIGALRM, before)
        sizes = (LENGTH_HEADER.unpack(stream.read(LENGTH_HEADER.size))[0] for _ in calls)
        replies = [json.loads(stream.read(size)) for size in sizes]
    assert [reply.get("timeout", False) for reply in replies] == [False, True, True, False]
    assert json.loads(replies[-1]["value"])["total"] == 1


def test_a_method_that_cannot_be_interrupted_ends_its_own_episode_only():
    async def use(environments):
        async with environments.open() as game, environments.open() as other:
            await game.reset({"question": "?"})
            await other.reset({"question": "?"})
            stuck = asyncio.create_task(game.call("stuck", {}, 0.3))
            assert not (await other.call("add", {}, LONG)).is_error
            with pytest.raises(ToolCallTimeout):
                await stuck
            with pytest.raises(EnvironmentFailed):
                await other.call("crash", {}, LONG)

    play(use)


def test_a_killed_server_costs_the_episodes_that_were_being_played():
    async def use(environments):
        async with environments.open() as idle:
            await idle.reset({"question": "?"})
        async with environments.open() as first, environments.open() as second:
            await first.reset({"question": "?"})
            await second.reset({"question": "?"})
        async with environments.open() as game:
            await game.reset({"question": "?"})
            environments._process.kill()
            with pytest.raises(EnvironmentFailed, match="call"):
                await game.call("sleep", {"seconds": LONG}, LONG)
        await environments._process.wait()
        await until(lambda: not any(process.is_alive for process in environments._idle))
        for _ in range(3):
            async with environments.open() as game:
                assert await game.reset({"question": "?", "truth": 1}) == "Count to 1."

    play(use)


def test_schemas_of_decorated_methods_have_the_attributes_name_and_no_self():
    parameters = {
        tool["function"]["name"]: list(tool["function"]["parameters"]["properties"])
        for tool in describe_environment(own.Unusual).tools
    }
    expected = {
        name: list(inspect.signature(getattr(own.Unusual(), name)).parameters)
        for name in ("add", "name", "square", "results", "fail_at_length", "end", "noise")
    }
    assert parameters == expected | {"twice": [], "start_program": []}


def test_results_that_are_no_json_and_long_ones():
    async def use(environments):
        async with environments.open() as game:
            await game.reset({"question": "?"})
            texts = {
                name: (await game.call("results", {"name": name}, LONG)).text
                for name in ("array", "mixed", "keys", "cycle", "long")
            }
            assert texts == {
                "array": "[0, 1, 2]",
                "mixed": '{"a": 1, "b": 0.5, "c": "é"}',
                "keys": "{(0, 1): 2}",
                "cycle": "[[...]]",
                "long": "x" * 2**20,
            }
            failed = await game.call("fail_at_length", {}, LONG)
            assert len(failed.text) == len("error: ") + 2**20
            assert (await game.call("square", {"number": 3}, LONG)).text == "9"
            ended = await game.call("end", {}, LONG)
            assert ended.is_error and "ValueError" in ended.text
            assert not (await game.call("noise", {}, LONG)).is_done

    play(use, f"{MODULE}:Unusual")


def test_arguments_have_the_types_of_the_signature():
    schemas = {
        tool["function"]["name"]: tool["function"]["parameters"]
        for tool in describe_environment(own.Typed).tools
    }
    assert schemas["go"]["properties"] == {
        "direction": {"type": "string", "enum": ["north", "south"], "description": "where to."},
        "since": {
            "anyOf": [{"type": "string", "format": "date"}, {"type": "null"}],
            "description": "of the journey.",
        },
    }
    assert schemas["jump"]["properties"]["way"] == {"type": "string", "enum": ["run", "fly"]}
    assert schemas["jump"]["required"] == ["to"]
    assert schemas["rooms"]["properties"]["rooms"]["items"] == {"$ref": "#/$defs/Room"}
    assert set(schemas["rooms"]["$defs"]) == {"Room", "Point", "Direction"}
    assert schemas["add"]["properties"] == {"number": {"type": "integer"}, "other": {}}
    room = {"at": [0, 0], "exits": ["north"], "seen": "2026-01-01"}
    calls = [
        ("go", {"direction": "north", "since": "2026-01-01"}, room),
        ("go", {"direction": "up"}, "ValueError: direction: Input should be 'north' or 'south'"),
        ("jump", {"to": [1, 2], "way": "fly"}, [1, 2]),
        ("jump", {"to": [1]}, "ValueError: to.1: Field required"),
        ("rooms", {"rooms": [room, room]}, 2),
        ("name", {"text": 42, "limit": None}, ["42", None]),
        ("add", {"number": "3", "other": 4}, 7),
        ("add", {"nmber": 3, "other": 4}, "TypeError: "),
    ]

    async def use(environments):
        async with environments.open() as game:
            await game.reset({"question": "?", "seed": 1, "other": 2})
            for name, arguments, expected in calls:
                result = await game.call(name, arguments, LONG)
                if result.is_error:
                    assert result.text.startswith(f"error: {expected}"), result.text
                else:
                    assert json.loads(result.text) == expected
            assert await game.reward("") == 1.0

    play(use, f"{MODULE}:Typed")


def test_the_types_of_a_tool_are_read_once(monkeypatch):
    built = []

    def adapter(hint, **options):
        built.append(hint)
        return TypeAdapter(hint, **options)

    class Fresh:
        def add(self, number: int, other: int | None = None): ...

        @functools.wraps(add)
        def sum(self, *values, **named): ...

    monkeypatch.setattr(method_arguments, "TypeAdapter", adapter)
    for name in ("add", "sum"):
        for _ in range(3):
            tool = getattr(Fresh(), name)
            assert method_arguments.convert_arguments(tool, {"number": "3"}) == {"number": 3}
    assert built == [int, int | None]


def test_a_closed_run_has_closed_its_environments_and_what_they_started(tmp_path):
    async def use(environments):
        async with environments.open() as first, environments.open() as second:
            for game in (first, second):
                await game.reset({"question": "?"})
            draws = {(await game.call("noise", {}, LONG)).text for game in (first, second)}
            assert len(draws) == 2, "each process has a seed of its own"
            return int((await first.call("start_program", {}, LONG)).text)

    program = play(use, f"{MODULE}:Unusual", folder=str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 2
    assert wait_until_dead(program)


def test_a_process_whose_reply_is_late_is_not_used_again(monkeypatch):
    class Sink:
        def write(self, content):
            pass

    async def use():
        process = EnvironmentProcess(asyncio.StreamReader(), Sink(), 5.0)
        with pytest.raises(ToolCallTimeout):
            await process.call("sleep", {}, 0.0)
        assert not process.is_reusable

    monkeypatch.setattr(environment_pool, "GRACE_SECONDS", 0.0)
    monkeypatch.setattr(environment_pool, "LATE_SECONDS", 0.0)
    asyncio.run(use())


def test_a_server_that_cannot_fork_goes_on(monkeypatch):
    class Connection:
        is_closed = False

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.is_closed = True

    connections = [Connection(), Connection()]
    waiting = iter(connections)

    class Listener:
        def __getattr__(self, name):
            return lambda *_: None

        def accept(self):
            return next(waiting), None  # StopIteration ends the server

    def fork():
        raise BlockingIOError("Resource temporarily unavailable")

    monkeypatch.setattr(environment_server.socket, "socket", lambda *_: Listener())
    monkeypatch.setattr(environment_server.signal, "signal", lambda *_: None)
    monkeypatch.setattr(environment_server.os, "fork", fork)
    monkeypatch.setattr(environment_server.os, "dup2", lambda *_: None)
    with pytest.raises(StopIteration):
        environment_server.serve_environment(f"{MODULE}:Counter", "path", {})
    assert all(connection.is_closed for connection in connections)


@pytest.mark.parametrize("ending", ["raise", "hang", "exit"])
def test_a_failure_of_close_is_not_that_of_the_next_episode(ending, monkeypatch):
    monkeypatch.setattr(environment_pool, "CLOSE_SECONDS", 0.1)

    async def use(environments):
        for _ in range(2):
            async with environments.open() as game:
                await game.reset({"question": "?"})
                assert await game.reward("") == 0.5

    play(use, f"{MODULE}:Rude", at_close=ending)


def test_an_error_without_words_and_a_reward_that_is_no_number():
    async def use(environments):
        async with environments.open() as game:
            await game.reset({"question": "?"})
            assert (await game.call("fail", {}, LONG)).text == "error: WordlessError"
            with pytest.raises(EnvironmentFailed, match="inf"):
                await game.reward("")

    play(use, f"{MODULE}:Rude", at_close="no number")


def test_arguments_without_a_name_are_no_part_of_a_schema():
    [add] = [
        t["function"]
        for t in describe_environment(own.Rude).tools
        if t["function"]["name"] == "add"
    ]
    assert add["parameters"] == {
        "type": "object",
        "properties": {"number": {"type": "integer", "description": "the first."}},
        "required": ["number"],
    }
