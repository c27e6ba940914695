"""Environments of one's own: schemas, mistakes, and processes that hang or end."""

import asyncio
import functools
import inspect
import json
import time
from pathlib import Path

import pytest
from pydantic import TypeAdapter
from transformers.utils import get_json_schema

from megatron_r1.agents import environment_pool, environment_server, tool_arguments
from megatron_r1.agents.environment import Description, describe
from megatron_r1.agents.environment_pool import (
    CallTimedOut,
    EnvironmentFault,
    EnvironmentProcess,
    Environments,
)
from megatron_r1.agents.environment_pool import describe as describe_apart
from megatron_r1.agents.environments.calculator import Calculator
from megatron_r1.config import AgentsConfig
from megatron_r1.errors import UserError
from tests.unit.agents import own_environments as own

MODULE = "tests.unit.agents.own_environments"


def play(use, name=f"{MODULE}:Counter", seconds=5.0, **options):
    """Run use(environments) and close them."""

    async def run():
        settings = AgentsConfig(environment=name, parameters=options, call_seconds=seconds)
        environments = Environments(settings, Description([], True))
        try:
            return await use(environments)
        finally:
            await environments.close()

    return asyncio.run(run())


def test_what_a_class_prepares_is_done_once_before_the_first_episode(tmp_path):
    async def use(environments):
        async with environments.open() as first, environments.open() as second:
            return [await game.reset({"question": "?"}) for game in (first, second)]

    options = {"path": str(tmp_path / "prepared"), "pause": 1.5}
    assert play(use, f"{MODULE}:Prepared", seconds=1.0, **options) == ["prepared "] * 2


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
            with pytest.raises(EnvironmentFault, match="FileNotFoundError.*gone.jsonl"):
                await game.reset({"question": "?"})

    play(use, "retrieval", corpus=str(tmp_path / "gone.jsonl"))


def test_schemas_are_those_of_transformers_where_arguments_are_documented():
    def fail(reason: str) -> None:
        """Raise.

        Args:
            reason: of the error.
        """

    schemas = {tool["function"]["name"]: tool for tool in describe(own.Counter).tools}
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
    [calculate] = describe(Calculator).tools
    assert calculate["function"]["parameters"]["required"] == ["expression"]
    assert [describe(c).grades for c in (own.Counter, own.Ungrading)] == [True, False]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("calculatr", "unknown environment 'calculatr'; did you mean 'calculator'"),
        (f"{MODULE}:Countr", "has no environment class Countr; did you mean 'Counter'"),
        ("nowhere.at_all:Game", "No module named 'nowhere'"),
    ],
)
def test_an_unknown_environment_is_named(name, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        describe_apart(name)


def test_a_class_that_is_no_environment_is_refused():
    with pytest.raises(UserError, match="NoTools has no public method besides reset, get_reward"):
        describe(own.NoTools)
    with pytest.raises(UserError, match="NoReset has no method reset"):
        describe(own.NoReset)
    with pytest.raises(UserError, match="DoneMethod.done is a method; it is reserved"):
        describe(own.DoneMethod)


def test_an_episode_with_coroutines_options_errors_and_an_end():
    async def use(environments):
        async with environments.open() as game:
            assert await game.reset({"question": "?", "truth": 3, "other": 1}) == "Count to 3."
            result = await game.call("add", {"number": 2}, 9)
            assert (result.text, result.is_error, result.done) == (
                '{"total": 4, "note": "é"}',
                False,
                False,
            )
            result = await game.call("fail", {"reason": "lone \ud800"}, 9)
            assert (result.text, result.is_error) == ("error: RuntimeError: lone \ud800", True)
            for arguments in ({"numbr": 1}, [1], None):
                assert (await game.call("add", arguments, 9)).text.startswith("error: TypeError: ")
            assert not (await game.call("shout", {}, 5)).is_error
            assert await game.reward("") == 1.0
            assert (await game.call("add", {"number": 99}, 9)).done
        async with environments.open() as again:  # the same process, another instance
            await again.reset({"question": "?"})
            assert await again.reward("") == 0.0

    play(use, step=2)


def test_failures_of_reset_and_get_reward_and_of_the_machine_are_the_environments():
    async def use(environments):
        async with environments.open() as game:
            with pytest.raises(EnvironmentFault, match="reset: OSError: the server of the game"):
                await game.reset({"question": "?", "broken": True})
            await game.reset({"question": "?"})
            await game.call("add", {"number": 13}, 9)
            with pytest.raises(EnvironmentFault, match="get_reward: ValueError: 13"):
                await game.reward("")
            with pytest.raises(EnvironmentFault, match="fail: RunError: the machine"):
                await game.call("fail", {"reason": "the machine"}, 9)

    play(use)


def test_a_method_that_hangs_ends_its_own_episode_only():
    async def use(environments):
        async with environments.open() as game, environments.open() as other:
            await game.reset({"question": "?"})
            await other.reset({"question": "?"})
            stuck = asyncio.create_task(game.call("stuck", {}, 0.3))
            for method in ("sleep", "wait"):  # interrupted, and goes on
                slept = await other.call(method, {"seconds": 60}, 0.2)
                assert (slept.text, slept.is_error) == ("error: no result within 0.2 s", True)
            assert not (await other.call("add", {}, 9)).is_error
            with pytest.raises(CallTimedOut):
                await stuck
            with pytest.raises(EnvironmentFault):
                await other.call("crash", {}, 9)

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
            with pytest.raises(EnvironmentFault, match="process ended during call"):
                await game.call("sleep", {"seconds": 60}, 9)
        await environments._process.wait()
        while any(process.is_alive for process in environments._idle):
            await asyncio.sleep(0.01)
        for _ in range(3):
            async with environments.open() as game:
                assert await game.reset({"question": "?", "truth": 1}) == "Count to 1."

    play(use)


def test_schemas_of_decorated_methods_have_the_attributes_name_and_no_self():
    parameters = {
        tool["function"]["name"]: list(tool["function"]["parameters"]["properties"])
        for tool in describe(own.Unusual).tools
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
                name: (await game.call("results", {"name": name}, 9)).text
                for name in ("array", "mixed", "keys", "cycle", "long")
            }
            assert texts == {
                "array": "[0, 1, 2]",
                "mixed": '{"a": 1, "b": 0.5, "c": "é"}',
                "keys": "{(0, 1): 2}",
                "cycle": "[[...]]",
                "long": "x" * 2**20,
            }
            failed = await game.call("fail_at_length", {}, 9)
            assert len(failed.text) == len("error: ") + 2**20
            assert (await game.call("square", {"number": 3}, 9)).text == "9"
            ended = await game.call("end", {}, 9)
            assert ended.is_error
            assert "truth value of an array" in ended.text
            assert not (await game.call("noise", {}, 9)).done

    play(use, f"{MODULE}:Unusual")


def test_arguments_have_the_types_of_the_signature():
    schemas = {
        tool["function"]["name"]: tool["function"]["parameters"]
        for tool in describe(own.Typed).tools
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
                result = await game.call(name, arguments, 9)
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

    monkeypatch.setattr(tool_arguments, "TypeAdapter", adapter)
    for name in ("add", "sum"):
        for _ in range(3):
            tool = getattr(Fresh(), name)
            assert tool_arguments.converted_arguments(tool, {"number": "3"}) == {"number": 3}
    assert built == [int, int | None]


def test_a_closed_run_has_closed_its_environments_and_what_they_started(tmp_path):
    async def use(environments):
        async with environments.open() as first, environments.open() as second:
            for game in (first, second):
                await game.reset({"question": "?"})
            draws = {(await game.call("noise", {}, 9)).text for game in (first, second)}
            assert len(draws) == 2, "each process has a seed of its own"
            return int((await first.call("start_program", {}, 9)).text)

    program = play(use, f"{MODULE}:Unusual", folder=str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 2
    for _ in range(1000):
        if not is_running(program):
            break
        time.sleep(0.01)
    else:
        pytest.fail("the program still runs")


def is_running(process_id):
    try:
        return Path(f"/proc/{process_id}/stat").read_text().split()[2] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_process_whose_reply_is_late_is_not_used_again(monkeypatch):
    class Sink:
        def write(self, content):
            pass

    async def use():
        process = EnvironmentProcess(asyncio.StreamReader(), Sink(), 5.0)
        with pytest.raises(CallTimedOut):
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
        environment_server.serve(f"{MODULE}:Counter", "path", {})
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
            assert (await game.call("fail", {}, 9)).text == "error: WordlessError"
            with pytest.raises(EnvironmentFault, match="returned inf; return a finite number"):
                await game.reward("")

    play(use, f"{MODULE}:Rude", at_close="no number")


def test_arguments_without_a_name_are_no_part_of_a_schema():
    [add] = [t["function"] for t in describe(own.Rude).tools if t["function"]["name"] == "add"]
    assert add["parameters"] == {
        "type": "object",
        "properties": {"number": {"type": "integer", "description": "the first."}},
        "required": ["number"],
    }
