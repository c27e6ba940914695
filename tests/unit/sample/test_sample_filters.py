"""Every filter on hand-written responses, which are in `filters.yaml`."""

import asyncio
import re
from pathlib import Path

import pytest
import yaml
from r1_grading import RewardPool
from refusals import refused

from megatron_r1.base.errors import Cause
from megatron_r1.data.prompt import make_prompt
from megatron_r1.evaluation.response import TextResponse
from megatron_r1.sample.filter_settings import FILTER_NAMES, active_filters, check_filters
from megatron_r1.sample.filters import FILTERS, PooledFilters, first_objection

TABLE = yaml.safe_load(Path(__file__).with_name("filters.yaml").read_text(encoding="utf-8"))
EN = (
    "We need the sum of the first ten odd numbers. The sum of the first n odd numbers is a square, "
    "so the answer should be one hundred. Let me check with a smaller case to be sure."
)
ZH = (
    "我们需要求前十个奇数的和。前若干个奇数的和是一个平方数，"
    "所以答案应该是一百。让我用一个更小的例子来验证一下这个结论。"
)
CASES = "\n".join(
    f"Case {i}: n = {i} gives {i * i}, a square of {'abcdefghij'[i]}." for i in range(10)
)
CODE = "```python\nprint(100)\n```"


def prompt(kind="math", **fields):
    return make_prompt("Sum of the first ten odd numbers?", kind, "100", fields)


def reason_for(name, text, asked=None, opened=False, is_truncated=False, **options):
    response = TextResponse(text, 10, is_truncated, opened)
    return FILTERS[name](response, asked or prompt(), **options)


def think(thought, summary="It is 100."):
    return f"<think>{thought}</think>\n{summary}"


def text_of(case):
    pieces = {"{en}": EN, "{zh}": ZH, "{cases}": CASES, "{code}": CODE}
    return re.sub("|".join(map(re.escape, pieces)), lambda found: pieces[found[0]], case["text"])


def dropped_for(case):
    return reason_for(case["filter"], text_of(case), **case.get("options", {}))


@pytest.mark.parametrize("name", TABLE["kept"])
def test_a_good_answer_is_kept(name):
    assert dropped_for(TABLE["kept"][name]) == ""


@pytest.mark.parametrize("name", TABLE["dropped"])
def test_a_bad_answer_is_dropped_with_a_reason(name):
    case = TABLE["dropped"][name]
    assert re.search(case.get("shows", "."), dropped_for(case))


def test_what_the_question_is_about_counts():
    program = think(CODE)
    assert reason_for("code_blocks", program, prompt("code")) == ""
    assert reason_for("code_blocks", program, prompt("my:grade"), kinds=["code", "my:grade"]) == ""
    # A bilingual set has a target language per question, which the language reward reads too.
    assert reason_for("language", think(ZH, "一百。"), prompt(target="zh")) == ""
    assert "0%" in reason_for("language", think(EN), prompt(target="zh"))
    # A field of that name which is no language is the question's own affair.
    assert reason_for("language", think(EN), prompt(target=24)) == ""


def test_a_thought_that_the_prompt_opened_is_the_same_thought():
    assert reason_for("format", "a</think>It is 100.", opened=True) == ""
    assert "2" in reason_for("format", "<think>a</think>It is 100.", opened=True)
    assert reason_for("code_blocks", "```\n1\n```</think>It is 100.", opened=True)
    assert reason_for("code_blocks", "a</think>```\n1\n```", opened=True) == ""


def test_what_was_cut_is_dropped():
    assert reason_for("truncated", think(EN)) == ""
    assert reason_for("truncated", think(EN), is_truncated=True) != ""


def test_workers_give_the_same_reasons_as_the_filters():
    """As in a run: in another process, with responses and questions as JSON."""
    texts = map(text_of, [*TABLE["kept"].values(), *TABLE["dropped"].values()])
    cases = [(TextResponse(text), prompt()) for text in texts]
    cases += [
        (TextResponse(think(EN), 9, True), prompt()),
        (TextResponse("a</think>It is 100.", thought_opened=True), prompt()),
        (TextResponse(think(CODE)), prompt("code", tests=["x"])),
        (TextResponse(think(EN)), prompt(target="zh")),
    ]
    filters = active_filters("sft", {"paragraphs": {"max_words": 200}, "repetition": False})

    async def filter_all():
        async with RewardPool(1, timeout_seconds=600) as pool:
            pooled = PooledFilters(pool, filters)
            return await asyncio.gather(*(pooled(asked, r) for r, asked in cases))

    reasons = [(d.code, d.why) if d else ("", "") for d in asyncio.run(filter_all())]
    assert reasons == [first_objection(r, asked, filters) for r, asked in cases]
    assert len({code for code, _ in reasons}) == 6


def test_the_first_filter_that_objects_gives_the_reason():
    filters = active_filters("sft", {})
    assert tuple(filters) == FILTER_NAMES
    bad = TextResponse(think(EN + ZH * 3), is_truncated=True)
    assert first_objection(bad, prompt(), filters)[0] == "truncated"
    assert (
        first_objection(bad, prompt(), active_filters("sft", {"truncated": False}))[0] == "language"
    )
    only = active_filters("responses", {"repetition": {"min_new": 0.9}})
    assert only == {"repetition": {"min_new": 0.9}}
    assert first_objection(bad, prompt(), only)[0] == "repetition"
    assert first_objection(TextResponse(think(EN)), prompt(), filters) == ("", "")


@pytest.mark.parametrize("case", TABLE["refused"], ids=lambda case: case["key"])
def test_a_mistake_is_named_when_the_recipe_is_read(case):
    with refused(case["key"], Cause(case["cause"]), *case.get("shows", ())):
        check_filters(case["filters"])
