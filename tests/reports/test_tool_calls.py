"""Tool calls: what a parser makes of sampled text, and of calls that it cannot read."""

import asyncio
import json
import random

import pytest

from megatron_r1.agents.continuation import Continuation
from megatron_r1.agents.hermes_parser import HermesParser, parse_hermes
from megatron_r1.agents.parsed_turn import PARSE_ERROR, ParsedTurn
from megatron_r1.agents.turn_parsing import TurnReader
from tests.harness.chat_tokenizer import chat_tokenizer


def calls_of(parsed):
    functions = [call["function"] for call in parsed.tool_calls]
    return [(each["name"], json.loads(each["arguments"])) for each in functions]


def written(name, arguments, key="arguments"):
    return f"<tool_call>\n{json.dumps({'name': name, key: arguments})}\n</tool_call>"


LITERALS = ["</tool_call>", "<tool_call>", "</think>", "<think>", '"}</tool_call>', "{<tool_call>{"]


@pytest.mark.parametrize("literal", LITERALS)
def test_b28_a_tag_in_the_json_text_ends_nothing(literal):
    arguments = {"text": f"use {literal} to close"}
    one = written("write", arguments)
    assert calls_of(parse_hermes(one)) == [("write", arguments)]
    both = parse_hermes(written("a", {}) + "\n" + one)
    assert calls_of(both) == [("a", {}), ("write", arguments)]
    thinking = parse_hermes(f"<think>I see.</think>\nDone. {one}")
    assert (thinking.reasoning, thinking.content) == ("I see.", "Done.")
    assert calls_of(thinking) == [("write", arguments)] and not thinking.failure


@pytest.mark.parametrize(
    "prose", ["Use <tool_call> tags. ", "<tool_call> ... <tool_call>", "A <tool_call>\n\n"]
)
def test_b28_a_tag_in_prose_opens_no_call(prose):
    call = written("f", {"x": 1})
    parsed = parse_hermes(prose + call)
    assert calls_of(parsed) == [("f", {"x": 1})] and parsed.content == prose.strip()
    assert parsed.failure
    in_thought = parse_hermes(f"I could {prose}{call} here</think>{call}")
    assert calls_of(in_thought) == [("f", {"x": 1})] and in_thought.content == ""


@pytest.mark.parametrize(
    ("body", "arguments"),
    [
        ('{"name": "a"}', {}),
        ('{"name": "a", "arguments": null}', {}),
        ('{"name": "a", "arguments": {}}', {}),
        ('{"name": "a", "arguments": ""}', {}),
        ('{"name": "a", "parameters": {"x": 1}}', {"x": 1}),
        ('{"name": "a", "arguments": {}, "parameters": {}}', {}),
        ('{"name": "a", "arguments": null, "parameters": {"x": 1}}', {"x": 1}),
        ('{"name": "a", "arguments": "{\\"x\\": 1}"}', {"x": 1}),
        ('{"type": "function", "function": {"name": "a", "arguments": {"x": 1}}}', {"x": 1}),
        ('{"id": "3", "name": "a", "arguments": {"x": [1, {"y": null}]}}', {"x": [1, {"y": None}]}),
    ],
)
def test_b29_arguments_are_kept_under_either_name(body, arguments):
    parsed = parse_hermes(f"<tool_call>{body}</tool_call>")
    assert calls_of(parsed) == [("a", arguments)] and not parsed.failure


@pytest.mark.parametrize(
    "body",
    [
        '{"name": "a", "args": {"x": 1}}',
        '{"name": "a", "input": {"x": 1}}',
        '{"name": "a", "x": 1}',
        '{"name": "a", "arguments": [1]}',
        '{"name": "a", "arguments": 0}',
        '{"name": "a", "arguments": false}',
        '{"name": "a", "arguments": "x = 1"}',
        '{"name": "a", "arguments": {"x": 1}, "parameters": {"x": 2}}',
        '{"name": "a", "arguments": {"x": 1, "x": 2}}',
        '{"name": "a", "arguments": {"x": NaN}}',
        '{"name": "a", "arguments": {"x": 1e999}}',
        '{"name": "", "arguments": {}}',
        '{"name": 3}',
        '{"arguments": {"x": 1}}',
        '{"name": "a", "arguments": {"x": 1}',
        '{"name": "a"} trailing',
        "{'name': 'a'}",
        '{"name": "a", "arguments": ' + '{"x":' * 100_000,
    ],
)
def test_b29_what_is_no_call_stays_text_with_a_reason(body):
    text = f"Look. <tool_call>{body}</tool_call>"
    for whole in (text, written("b", {}) + text, text + written("b", {})):
        parsed = parse_hermes(whole)
        assert (parsed.tool_calls, parsed.content) == ([], whole) and parsed.failure


def test_b29_a_call_that_is_cut_off_takes_no_half_of_the_others():
    whole = written("a", {"x": 1}) + '<tool_call>{"name": "b", "argum'
    parsed = parse_hermes(whole)
    assert (parsed.tool_calls, parsed.content) == ([], whole) and parsed.failure


def test_b29_text_around_calls_is_kept():
    parsed = parse_hermes(f"First. {written('a', {})} Between. {written('b', {})} Last.")
    assert [name for name, _ in calls_of(parsed)] == ["a", "b"]
    assert parsed.content == "First.\nBetween.\nLast."


PIECES = [
    *("<tool_call>", "</tool_call>", "<think>", "</think>", "{", "}", '"', "\\", "\n", " word "),
    *('{"name": "f"', '"arguments": {', '"name"', ": ", "null", "1e999", "\ud83d", "é", "[", "]"),
    *(written("g", {"k": "</tool_call> <tool_call> </think>"}), written("h", {}, "parameters")),
]


def squeezed(text):
    for tag in ("<think>", "</think>", "<tool_call>", "</tool_call>"):
        text = text.replace(tag, "")
    return "".join(text.split())


def test_b28_b29_any_text_becomes_calls_that_reproduce_it_or_text_with_a_reason():
    draw = random.Random(3)
    num_calls = num_texts = 0
    for _ in range(4000):
        text = "".join(draw.choices(PIECES, k=draw.randint(1, 9)))
        parsed = parse_hermes(text)
        outside = (parsed.reasoning or "") + (parsed.content or "")
        if "<tool_call>" in (parsed.content or ""):
            assert parsed.failure, text
        if not parsed.tool_calls:
            assert squeezed(outside) == squeezed(text), text
            num_texts += 1
            continue
        num_calls += 1
        calls = [call["function"] for call in parsed.tool_calls]
        for call in calls:
            assert call["name"] in "fgh"
            wanted = {"g": {"k": "</tool_call> <tool_call> </think>"}, "h": {}}
            assert json.loads(call["arguments"]) == wanted[call["name"]]
        # Nothing is lost and nothing is there twice: what is no call is content or thought.
        for name in ("g", "h"):
            num = sum(call["name"] == name for call in calls)
            assert num + outside.count(f'"name": "{name}"') == text.count(f'"name": "{name}"')
        assert outside.count("word") == text.count("word")
        assert outside.count("é") == text.count("é")
    assert num_calls > 300 and num_texts > 300


def read(text, parser=None, **options):
    reader = TurnReader(parser or HermesParser(), Continuation(chat_tokenizer()))
    return asyncio.run(reader.read(text, [1], [1], [], **options))


def test_b29_the_reply_says_why_a_call_is_text():
    assert "args" in read('<tool_call>{"name": "a", "args": {"x": 1}}</tool_call>')[PARSE_ERROR]
    assert PARSE_ERROR not in read(written("a", {}))

    class Emptying(HermesParser):
        async def parse(self, job):
            return ParsedTurn(None, "")

    assert read("<function=a>", Emptying())["content"] == "<function=a>"


def test_b30_calls_that_are_left_out_are_said():
    message = read(written("a", {}) + written("b", {}), max_calls=1)
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["a"]
    assert message[PARSE_ERROR]
    assert PARSE_ERROR not in read(written("a", {}), max_calls=1)
