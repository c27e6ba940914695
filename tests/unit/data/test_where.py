"""Conditions of `data.where`, and prompts with a system's message."""

import json

import pytest
from chat_tokenizer import CHATML, chat_tokenizer
from refusals import refused

from megatron_r1.base.errors import Cause
from megatron_r1.data.prompt_templates import render_template
from megatron_r1.data.prompt_tokenizer import PromptTokenizer
from megatron_r1.data.prompts import load_prompts
from megatron_r1.data.row_filter import meets_condition

SYSTEM = {"role": "system", "content": "Be kind."}


@pytest.mark.parametrize(
    ("value", "condition", "expected"),
    [
        ("cn_k12", "cn_k12", True), (" cn_k12", "cn_k12", True), ("CN_K12", "cn_k12", False),
        ("0.50", 0.5, True), (0.5, "0.50", True), (3, [1, 3], True), (4, [1, 3], False),
        ("Yes", True, True), ("no", False, True), ("No", True, False), (True, "true", True),
        (1, True, True), (None, None, True), (None, "x", False), ("n/a", None, False),
        (float("nan"), None, True), ("0.65625", {"min": 0.5}, True), ("n/a", {"min": 0.5}, False),
        (None, {"max": 1}, False), (None, {"max": 1, "or": None}, True), (2, {"max": 1}, False),
        ("n/a", {"max": 1, "or": ["n/a", None]}, True), (0.2, {"min": 0.1, "max": "0.3"}, True),
        ("proof", {"not": "proof"}, False), ("MCQ", {"not": ["proof", "x"]}, True),
        (None, {"not": None}, False), (5, {"min": 1, "not": 5}, False), (True, {"min": 0}, False),
        (["a", "b"], "b", True), (["a", "b"], ["c", "d"], False), (["a", "b"], {"not": "a"}, False),
        ([], "a", False), ([], {"not": "a"}, True), ([1, 9], {"min": 5}, True),
    ],
)  # fmt: skip
def test_a_value_meets_a_condition(value, condition, expected):
    assert meets_condition(value, condition) is expected


@pytest.mark.parametrize(
    ("where", "key", "cause"),
    [
        ({"rat": 1}, "data.where.rat", Cause.NOT_FOUND),
        ({"meta.leve": 1}, "data.where.meta.leve", Cause.NOT_FOUND),
        ({"rate": {"mni": 1}}, "data.where.rate", Cause.UNKNOWN),
        ({"rate": {"min": "low"}}, "data.where.rate.min", Cause.MALFORMED),
        ({"rate": {"or": None}}, "data.where.rate", Cause.EMPTY),
        ({"rate": {"min": 2}}, "data.where.rate", Cause.EMPTY),
    ],
)
def test_a_condition_that_cannot_hold_is_refused(tmp_path, where, key, cause):
    path = tmp_path / "rows.jsonl"
    row = {"question": "a?", "truth": 1, "rate": 0.5, "meta": json.dumps({"level": 2})}
    path.write_text(json.dumps(row))
    with refused(key, cause):
        load_prompts(path=path, where=where)
    assert load_prompts(path=path, where={"meta.level": 2}, heldout_fraction=0.0).train


def test_a_system_s_message_reaches_the_prompt(tmp_path):
    chat_tokenizer(CHATML).save_pretrained(tmp_path)
    tokenizer = PromptTokenizer(str(tmp_path), "chat")
    turns = [SYSTEM, {"role": "user", "content": "one?"}]
    whole = chat_tokenizer(CHATML).apply_chat_template(turns, add_generation_prompt=True)
    assert tokenizer.encode("one?", [SYSTEM]) == list(whole["input_ids"])
    limit = len(tokenizer.encode("one?", [SYSTEM]))
    assert tokenizer.fits("one?", limit + 1, [SYSTEM]) and not tokenizer.fits(
        "one?", limit, [SYSTEM]
    )
    plain = PromptTokenizer(str(tmp_path), "plain")
    assert plain.render("one?", [SYSTEM]) == "User: Be kind.\n\none?\nAssistant:"
    assert render_template("{system} Q: {question}", "{system}?", "S") == "S Q: {system}?"
    assert render_template("{system}Q: {question}", "one?") == "Q: one?"
    with refused("data.template", Cause.CONFLICT, "one?"):
        plain.encode("two?", turns)


@pytest.mark.parametrize("refuses", ["{{ raise_exception('no system') }}", "{{ '' }}"])
def test_where_a_template_shows_no_system_it_stands_before_the_question(tmp_path, refuses):
    hidden = f"{{% if messages[0].role == 'system' %}}{refuses}"
    template = hidden + "{% set messages = messages[1:] %}{% endif %}" + CHATML
    chat_tokenizer(template).save_pretrained(tmp_path)
    tokenizer = PromptTokenizer(str(tmp_path), "chat")
    assert "<|im_start|>user\nBe kind.\n\none?<|im_end|>" in tokenizer.render("one?", [SYSTEM])
    assert not tokenizer.shows_system
