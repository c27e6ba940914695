"""Which tokens of a conversation are learned, against the mask that transformers computes from a
template that marks the assistant's text."""

import json

import pytest
from chat_tokenizer import CHATML, LAST_THOUGHT, QWEN3, chat_tokenizer
from refusals import refused

from megatron_r1.base.errors import Cause
from megatron_r1.commands.sft import make_sample
from megatron_r1.data.sft import load_examples, read_example
from megatron_r1.data.sft_tokenizer import SFTTokenizer

HEADER = "<|im_start|>{{ m.role }}\n"
PROMPT = "<|im_start|>assistant\n{% endif %}"
OPENING = CHATML.replace(PROMPT, "<|im_start|>assistant\n<think>\n{% endif %}")
WITHOUT_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
)
SYSTEM = {"role": "system", "content": "Be kind."}
FIRST, SECOND = ({"role": "user", "content": text} for text in ("one?", "two?"))
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
}
RESULT = {"role": "tool", "content": "3"}


def answer(text, thought=None):
    return {"role": "assistant", "content": text} | (
        {"reasoning_content": thought} if thought else {}
    )


CONVERSATIONS = [
    [FIRST, answer("1")],
    [SYSTEM, FIRST, answer("1", "hm"), SECOND, answer("2", "so")],
    [FIRST, CALL, RESULT, answer("It is 3.", "seen"), SECOND, answer("2\n\n")],
    [FIRST, answer(" <b>1</b>\n"), FIRST, answer(" <b>1</b>\n")],
    [SYSTEM, FIRST, CALL, RESULT, CALL, RESULT, answer("<|done|> ✓")],
]


def marked(template):
    """Return the template with the assistant's text, and the end of its turn, marked."""
    body = template.partition(HEADER)[2].partition("<|im_end|>\n{% endfor %}")[0]
    inner = f"{body}<|im_end|>"
    both = (
        "{% if m.role == 'assistant' %}{% generation %}" + inner + "{% endgeneration %}"
        "{% else %}" + inner + "{% endif %}{{ '\\n' }}{% endfor %}"
    )
    return template.replace(f"{body}<|im_end|>\n{{% endfor %}}", both)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A function that returns the `SFTTokenizer` of a template."""
    made = {}

    def text(template):
        if template not in made:
            folder = tmp_path_factory.mktemp("tokenizer")
            chat_tokenizer(template).save_pretrained(folder)
            made[template] = SFTTokenizer(str(folder), None)
        return made[template]

    return text


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("template", [CHATML, QWEN3, LAST_THOUGHT])
def test_the_assistant_s_turns_are_learned(texts, template, messages):
    marks = marked(template)
    assert marks != template
    oracle = chat_tokenizer(marks).apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    example = read_example("row", {"messages": messages})
    for own in (template, marks):
        ids, learned = texts(own).encode(example)
        assert ids == list(oracle["input_ids"])
        assert learned == [bool(mark) for mark in oracle["assistant_masks"]], own


def test_what_the_prompt_opens_is_not_learned(texts):
    messages = [SYSTEM, FIRST, answer("1", "hm"), SECOND, answer("2")]
    ids, learned = texts(OPENING).encode(read_example("row", {"messages": messages}))
    shown = texts(OPENING).decode([i if mark else 0 for i, mark in zip(ids, learned, strict=True)])
    parts = [part for part in shown.split("<|endoftext|>") if part]
    assert parts == ["hm\n</think>\n\n1<|im_end|>", "2<|im_end|>"]


def test_of_a_prompt_with_turns_only_the_completion_is_learned(texts):
    row = {"prompt": [FIRST, answer("1"), SECOND], "completion": [answer("2")]}
    for template in (CHATML, marked(CHATML)):
        text = texts(template)
        ids, learned = text.encode(read_example("row", row))
        own = [token for token, mark in zip(ids, learned, strict=True) if mark]
        assert text.decode(own) == "2<|im_end|>"


def test_a_message_of_weight_0_is_not_learned(texts):
    messages = [FIRST, answer("1") | {"weight": 0}, SECOND, answer("2") | {"weight": 1}]
    for template in (CHATML, marked(CHATML)):
        text = texts(template)
        ids, learned = text.encode(read_example("row", {"messages": messages}))
        own = [token for token, mark in zip(ids, learned, strict=True) if mark]
        assert text.decode(own) == "2<|im_end|>"


def test_a_system_s_message_is_never_lost(texts):
    row = {"messages": [SYSTEM, FIRST, answer("1")]}
    text = texts(WITHOUT_SYSTEM)
    ids, learned = text.encode(read_example("row", row))
    assert text.decode(ids).startswith("<|im_start|>user\nBe kind.\n\none?<|im_end|>")
    own = [token for token, mark in zip(ids, learned, strict=True) if mark]
    assert text.decode(own) == "1<|im_end|>"


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
@pytest.mark.parametrize("read", ["reasoning_content", "thinking", ""])
def test_a_thought_is_learned_whatever_its_key_and_the_template_s(texts, key, read):
    thought = (
        "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    )
    text = texts(
        CHATML.replace(thought, thought.replace("reasoning_content", read) if read else "")
    )
    example = read_example("", {"messages": [FIRST, answer("1") | {key: "hm"}]})
    ids, learned = text.encode(example)
    shown = text.decode([i for i, is_learned in zip(ids, learned, strict=True) if is_learned])
    assert shown == "<think>\nhm\n</think>\n\n1<|im_end|>"


def test_conversations_without_a_name_are_rows(tmp_path):
    chats = [[FIRST, answer("1")], [SECOND, answer("2")]]
    lines = "\n".join(map(json.dumps, chats))
    for name, text in (("a.jsonl", lines), ("b.json", json.dumps(chats))):
        (tmp_path / name).write_text(text)
        assert [example.messages for example in load_examples(tmp_path / name)] == chats
    (tmp_path / "c.json").write_text(json.dumps(chats[0]))
    assert [example.messages for example in load_examples(tmp_path / "c.json")] == chats[:1]


def test_answers_without_text_teach_nothing():
    silent = {"from": "assistant", "ground_truth": {"value": "2"}}
    with refused("messages", Cause.MALFORMED, "empty"):
        read_example("", {"messages": [FIRST, silent]})


@pytest.mark.parametrize("name", ["system", "system_prompt", "systemInstruction"])
@pytest.mark.parametrize("value", ["Be kind.", {"parts": [{"text": "Be kind."}]}])
def test_a_row_s_own_system_prompt_stands_before_its_messages(name, value):
    example = read_example("", {"messages": [FIRST, answer("1")], name: value})
    assert example.messages[0] == SYSTEM


def test_a_template_that_shows_no_answer_is_refused(texts):
    hidden = CHATML.replace(
        "{{ m.content }}", "{% if m.role == 'user' %}{{ m.content }}{% endif %}"
    )
    with refused("messages", Cause.MALFORMED, "row:1"):
        texts(hidden.replace("<|im_end|>", "")).encode(
            read_example("row:1", {"messages": [FIRST, answer("1")]})
        )
    strict = "{% if messages|length > 2 %}{{ raise_exception('too long') }}{% endif %}" + CHATML
    with refused("messages", Cause.MALFORMED, "row:1", "too long"):
        texts(strict).encode(read_example("row:1", {"messages": CONVERSATIONS[1]}))


def test_without_a_chat_template_the_setting_is_named(tmp_path):
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    example = read_example("row:1", {"messages": [SYSTEM, FIRST, answer("1")]})
    with refused("sft.template", Cause.MISSING, "row:1"):
        SFTTokenizer(str(tmp_path), None).encode(example)
    with refused("sft.template", Cause.MISSING):
        SFTTokenizer(str(tmp_path), "chat")
    text = SFTTokenizer(str(tmp_path), "[{system}] Q: {question} A:")
    ids, learned = text.encode(example)
    assert text.decode(ids) == "[Be kind.] Q: one? A:1<|im_end|>"
    assert learned.count(True) == 2
    more = read_example("row:1", {"messages": [FIRST, answer("1"), SECOND, answer("2")]})
    with refused("sft.template", Cause.CONFLICT, "row:1"):
        text.encode(more)


def test_a_sample_has_a_mask_where_turns_lie_between(texts):
    text = texts(CHATML)
    one = make_sample(*text.encode(read_example("row", {"messages": CONVERSATIONS[0]})))
    assert not one.is_sampled and len(one) > one.prompt_length
    ids, learned = text.encode(read_example("row", {"messages": CONVERSATIONS[1]}))
    two = make_sample(ids, learned)
    first = learned.index(True)
    flags = list(two.is_sampled)
    assert two.prompt_length == first and flags == learned[first : first + len(flags)]
    assert flags[-1] == 1 and sum(flags) == sum(learned)
