"""Parser workers: vLLM's parsers on real text, and what becomes of a worker that is lost."""

import asyncio
import os

import pytest
from refusals import refused

from megatron_r1.agents import parser_pool
from megatron_r1.agents.continuation import Continuation
from megatron_r1.agents.hermes_parser import HermesParser
from megatron_r1.agents.parsed_turn import ParsedTurn, tool_call
from megatron_r1.agents.parser_pool import ParserPool
from megatron_r1.agents.parser_worker import ParseJob
from megatron_r1.agents.turn_parsing import TurnReader, find_parser
from megatron_r1.base.errors import Cause
from megatron_r1.config import AgentsConfig
from tests.harness.chat_tokenizer import chat_tokenizer

TOOL = {"type": "function", "function": {"name": "calculate", "parameters": {"type": "object"}}}


def test_a_parser_that_hangs_dies_or_raises_costs_its_turn_only(monkeypatch):
    async def run():
        async with ParserPool("", "hermes", None, num_workers=1, timeout_seconds=1e5) as parsers:

            async def parse(text):
                return await parsers.parse(ParseJob(text, [1], [2]))

            first = await parse("a")
            assert (first.reasoning, first.content[0]) == ("thought", "a")
            assert (await parse("raise")) == ParsedTurn(None, "raise", [], "ValueError: text")
            assert (await parse("a")) == first, "the worker lives on"
            for text, seconds in (("die", 1e5), ("hang", 0.5)):
                parsers._timeout_seconds = seconds
                lost = await parse(text)
                assert (lost.content, lost.tool_calls) == (text, []) and "lost" in lost.failure
            parsers._timeout_seconds = 1e5
            assert (await parse("a")).content != first.content, "another process"
            last = int((await parse("")).content)
        with pytest.raises(ProcessLookupError):
            os.kill(last, 0)
        async with ParserPool("", "unknown", None) as parsers:
            with refused("agents.tool_parser", Cause.UNKNOWN, "unknown"):
                await parsers.check()

    monkeypatch.setattr(parser_pool, "WORKER_MODULE", "tests.unit.agents.parser_stand_in")
    asyncio.run(run())


def test_without_parsers_a_turn_is_all_content_and_needs_no_process():
    async def run():
        async with ParserPool("", None, None) as parsers:
            assert await parsers.parse(ParseJob("<tool_call>", [1], [2], [TOOL])) == ParsedTurn(
                None, "<tool_call>"
            )

    asyncio.run(run())


@pytest.mark.parametrize(
    ("tool_parser", "reasoning_parser", "names"),
    [
        ("auto", None, None),
        ("hermes", None, None),
        ("none", None, ("", "")),
        ("auto", "deepseek_r1", ("hermes", "deepseek_r1")),
        ("none", "deepseek_r1", ("", "deepseek_r1")),
        ("qwen3_coder", None, ("qwen3_coder", "")),
    ],
)
def test_the_settings_choose_the_parser(tool_parser, reasoning_parser, names):
    settings = {"tool_parser": tool_parser, "reasoning_parser": reasoning_parser}
    parser = find_parser(AgentsConfig(**settings, parser_workers=3), "folder")
    if names is None:
        assert isinstance(parser, HermesParser)
    else:
        options = parser._options
        assert (options.tool_parser, options.reasoning_parser, options.tokenizer) == (
            *names,
            "folder",
        )
        assert parser._slots._value == 3


@pytest.mark.slow
def test_vllms_parsers(tmp_path):
    tokenizer = chat_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    text = (
        "<think>hm</think>Let me see.\n<tool_call>\n"
        '{"arguments": {"expression":  "1 × 2"}, "name": "calculate"}\n</tool_call>'
    )

    async def run():
        async with ParserPool(str(tmp_path), "hermes", "deepseek_r1", num_workers=1) as parsers:
            parsed = await parsers.parse(ParseJob(text, tokenizer.encode(text), [1], [TOOL]))
            assert (parsed.reasoning, parsed.content) == ("hm", "Let me see.\n")
            [call] = parsed.tool_calls
            assert call["function"] == {
                "name": "calculate",
                "arguments": '{"expression": "1 × 2"}',
            }
            assert parsed.message()["tool_calls"] == [call]
            cut = await parsers.parse(ParseJob("<think>hm", tokenizer.encode("<think>hm"), [1]))
            assert (cut.reasoning, cut.content, cut.message()["content"]) == ("hm", None, "")
        async with ParserPool(str(tmp_path), "hermez", None) as parsers:
            with refused("agents.tool_parser", Cause.UNKNOWN, "'hermez'", "'hermes'"):
                await parsers.check()

    asyncio.run(run())


def test_calls_of_vllms_parsers_without_an_object_are_content():
    class Parser(HermesParser):
        async def parse(self, job):
            return ParsedTurn("thought", "", [tool_call("f", job.text)])

    reader = TurnReader(Parser(), Continuation(chat_tokenizer()))
    for arguments in ('"x"', "[1]", "3", "null", "no JSON"):
        message = asyncio.run(reader.read(arguments, [1], [1], []))
        assert message.pop("tool_call_error")
        assert message == {"role": "assistant", "content": arguments}
    for arguments in ("{}", '{"a": 1}', ""):
        message = asyncio.run(reader.read(arguments, [1], [1], []))
        assert message["tool_calls"][0]["function"]["arguments"] == arguments


def test_arguments_nested_too_deep_are_content():
    reader = TurnReader(HermesParser(), Continuation(chat_tokenizer()))

    async def count(depth):
        nested = '{"a":' * depth + "1" + "}" * depth
        text = f'<tool_call>{{"name": "f", "arguments": {nested}}}</tool_call>'
        message = await reader.read(text, [1], [1], [])
        return len(message.get("tool_calls", ())), message["content"] == text

    assert asyncio.run(count(100)) == (1, False)
    for depth in (*range(900, 1000, 5), 5000):
        assert asyncio.run(count(depth)) in ((1, False), (0, True))
    assert asyncio.run(count(5000)) == (0, True)
