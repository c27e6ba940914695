"""B28, B29 for vLLM's parsers: any sampled text becomes calls that reproduce it, or is text with a
reason. `find_dropped_text` alone, without vLLM, and every parser on random texts of its form."""

import os
import random
import re
from collections import Counter
from pathlib import Path

import pytest
import yaml

from megatron_r1.agents.dropped_text import find_dropped_text
from megatron_r1.agents.parsed_turn import ParsedTurn, tool_call
from megatron_r1.agents.parser_worker import ParseJob, ParserOptions, TurnParser
from tests.harness.chat_tokenizer import chat_tokenizer

FORMS = yaml.safe_load((Path(__file__).parent / "tool_call_forms.yaml").read_text(encoding="utf-8"))
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
    for name in ("find_it", "other")
]
NUM_TEXTS = 150
CALL = '<tool_call>{"name": "f", "arguments": {"x": "one two"}}</tool_call>'


def written(form, value):
    return form["call"].replace("NAME", "find_it").replace("KEY", "ka").replace("VALUE", value)


@pytest.mark.parametrize("name", FORMS)
def test_b29_a_call_of_any_form_is_in_its_parts(name):
    text = written(FORMS[name], "wqa there")
    whole = [tool_call("find_it", '{"ka": "wqa there"}')]
    assert find_dropped_text(f"Look. {text}", None, "Look.", whole) == ""
    for calls in ([], [tool_call("find_it", "{}")], [tool_call("find_it", '{"ka": "there"}')]):
        assert find_dropped_text(f"Look. {text}", None, "Look.", calls)
    assert find_dropped_text(f"Look. {text}", None, "", whole)  # the prose is lost


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        (r'{"x": "a\u00e9b\nline \"q\" \\d"}', r'{"x": "aéb\nline \"q\" \\d"}'),
        ('{"x": 1.50, "y": [1e2, true, null]}', '{"x": 1.5, "y": [100.0, true, null]}'),
        ("[(x=1.50, y=True, z=None)]", '{"x": 1.5, "y": true, "z": null}'),
        (":12{}", "{}"),
        ('{"x": {"y": {"z": "deep"}}}', '{"x": {"y": {"z": "deep"}}}'),
    ],
)  # fmt: skip
def test_b29_numbers_and_escapes_may_be_written_otherwise(text, arguments):
    calls = [tool_call("f", arguments)]
    assert find_dropped_text(f"<call>functions.f{text}", None, None, calls) == ""


@pytest.mark.parametrize(
    ("text", "reasoning", "content", "calls"),
    [
        ("Look. <tool_call>", None, "Look. ", []),
        ("Look <tool_call>{}</tool_call>", None, "Look ", []),
        (CALL + CALL.replace("two", "three"), None, None, [tool_call("f", '{"x": "one two"}')]),
        (CALL + CALL, None, None, [tool_call("f", '{"x": "one two"}')]),
        ("<think>so</think>4", None, "4", []),
    ],
)
def test_b28_what_a_parser_drops_is_named(text, reasoning, content, calls):
    assert find_dropped_text(text, reasoning, content, calls)


@pytest.mark.parametrize(
    ("text", "reasoning", "content"),
    [
        ("<think>so</think>4", "so", "4"),
        ("Here is my thought process: so Here is my response: 4", "so", "4"),
        ("so[/THINK]then 4", None, "sothen 4"),  # as a special token that is left out
        ("Use <tool_call> tags.", None, "Use <tool_call> tags."),
        ("", None, None),
        ("x < 3 and y > 4 [NOTE]", None, "x < 3 and y > 4 [NOTE]"),
    ],
)
def test_b28_text_that_stays_text_is_not_named(text, reasoning, content):
    assert find_dropped_text(text, reasoning, content, []) == ""


def random_text(form, draw):
    """Pieces of the form's calls, whole and cut, of prose, and of other markup. Each word of the
    form wq… is unique."""
    pieces = []
    for number in range(draw.randint(1, 5)):
        call = written(form, f"wq{number}a {draw.choice(['', '<b> '])}wq{number}b")
        tags = re.findall(r"<[^<>]*>|\[TOOL_CALLS\]", form["call"]) or ["["]
        cut = draw.randint(0, len(call))
        odd = ["{", "}", '"', "\n", "</think>", "<think>", "null", "é\ud83d", draw.choice(tags)]
        pieces += draw.choices(
            [call, call[:cut], call[cut:], f" wq{number}c word ", draw.choice(odd)],
            weights=[4, 1, 1, 2, 2],
        )
    return "".join(pieces).encode("utf-8", "replace").decode()


def marks(text):
    return Counter(re.findall(r"wq\d[abc]", text or ""))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    own = chat_tokenizer()
    special = {token for form in FORMS.values() for token in form.get("tokens", ())}
    own.add_special_tokens({"additional_special_tokens": sorted(special)})
    own.save_pretrained(folder)
    return folder, own


@pytest.mark.more  # imports vLLM
@pytest.mark.parametrize("name", FORMS)
def test_b28_b29_random_texts_of_each_of_vllms_parsers(name, tokenizer, monkeypatch):
    monkeypatch.setitem(os.environ, "VLLM_LOGGING_LEVEL", "CRITICAL")
    folder, own = tokenizer
    form, draw = FORMS[name], random.Random(name)
    parser = TurnParser(ParserOptions(str(folder), name, ""))

    def parse(text):
        try:
            return parser.parse(ParseJob(text, own.encode(text), [1], TOOLS))
        except Exception as error:
            return ParsedTurn(None, text, failure=repr(error))

    call = written(form, "wqa there")
    reply = parse(call)
    assert [c["function"]["name"] for c in reply.tool_calls] == ["find_it"]
    assert not reply.reason, reply
    num_calls = 0
    for _ in range(NUM_TEXTS):
        text = random_text(form, draw)
        reply = parse(text)
        why = reply.failure if isinstance(reply, ParsedTurn) else reply.reason
        if why:
            assert (reply.content, reply.tool_calls) == (text, []), text
            continue
        num_calls += bool(reply.tool_calls)
        parts = [reply.reasoning, reply.content]
        functions = [call["function"] for call in reply.tool_calls]
        parts += [f"{function['name']} {function['arguments']}" for function in functions]
        found = sum(map(marks, parts), Counter())
        assert not marks(text) - found, (text, reply)
        assert any("find_it" in (part or "") for part in parts) or "find_it" not in text
    assert num_calls > 5
