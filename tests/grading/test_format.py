"""The format reward against one regular expression, and against what models write instead."""

import random
import re

import pytest
from r1_grading.response_rewards import FORMAT_TAGS
from r1_grading.response_rewards import grade_format as grade

TEXT = rf"(?:(?!{'|'.join(FORMAT_TAGS)}).)*"
EXPECTED = re.compile(rf"\s*<think>{TEXT}</think>\s*<answer>{TEXT}</answer>\s*", re.DOTALL)


def test_it_is_one_regular_expression_said_with_reasons():
    rng = random.Random(0)
    pieces = [
        *FORMAT_TAGS,
        *FORMAT_TAGS,
        "2 + 11",
        "13",
        " ",
        "\n",
        "<",
        ">",
        "/think>",
        "\\boxed{13}",
        "</",
    ]
    num_good = 0
    for _ in range(20_000):
        if rng.random() < 0.5:
            response = "".join(rng.choices(pieces, k=rng.randint(0, 8)))
        else:  # a good one, with something put in, taken out or exchanged at one place
            parts = ["<think>", "2 + 11", "</think>", " ", "<answer>", "13", "</answer>"]
            place = rng.randrange(len(parts) + 1)
            parts[place : place + rng.randint(0, 1)] = rng.choices(pieces, k=rng.randint(0, 1))
            response = "".join(parts)
        reward = grade(response).reward
        assert reward == float(bool(EXPECTED.fullmatch(response))), response
        num_good += reward == 1.0
    assert num_good > 1000


GOOD = "<think>2 + 11</think><answer>13</answer>"


@pytest.mark.parametrize("response", [GOOD, f"\n {GOOD}\n", GOOD.replace("><", ">\n\n<")])
def test_the_asked_format_gets_1(response):
    assert grade(response).reward == 1.0


@pytest.mark.parametrize(
    ("response", "tag"),
    [
        *(("", "<think>"), ("13", "<think>"), (GOOD + GOOD, "<think>")),
        ("2 + 11</think><answer>13</answer>", "<think>"),
        ("<think>2 + 11<answer>13</answer>", "</think>"),
        ("<think>2 + 11</think>13", "<answer>"),
        ("<think>2 + 11</think><answer>13", "</answer>"),
        (GOOD + "<answer>14</answer>", "<answer>"),
        ("<Think>2 + 11</Think><answer>13</answer>", "<think>"),
    ],
)
def test_the_reason_names_the_tag_at_fault(response, tag):
    given = grade(response)
    assert given.reward == 0.0 and f"{tag} occurs" in given.reason


def test_a_thought_opened_by_the_prompt_must_not_be_opened_again():
    assert grade("2 + 11</think><answer>13</answer>", thought_opened=True).reward == 1.0
    assert grade(GOOD, thought_opened=True).reward == 0.0


@pytest.mark.parametrize(
    "response",
    [
        "<think><answer>13</answer></think>",
        "<answer>13</answer><think>2 + 11</think>",
        *("so: " + GOOD, GOOD + ".", GOOD.replace("><", ">so<")),
        "<think>a</think>\u200b<answer>13</answer>",
        "\u200b<think>a</think><answer>13</answer>",
        "<think>a</think><answer>13</answer>\x00",
        "<\u200bthink>a</\u200bthink><answer>13</answer>",
        "< think>a</think><answer>13</answer>",
        "<think >a</think><answer>13</answer>",
        "<think>a</think><answer>13</аnswer>",
        "&lt;think&gt;a&lt;/think&gt;<answer>13</answer>",
        "```<think>a</think><answer>13</answer>```",
        "<think>write <think> and </think></think><answer>13</answer>",
        "<think>a</think><answer><answer>13</answer></answer>",
        "<think>a<answer>12</answer></think><answer>13</answer>",
        "<answer>13</answer><think>a</think><answer>13</answer>",
        "<think>Reasoning process here</think><answer>13</answer>",
        "<think>a</think><answer> answer here </answer>",
    ],
)
def test_look_alikes_nesting_and_copies_get_0(response):
    assert grade(response).reward == 0.0


@pytest.mark.parametrize("unit", ["<think>", "</answer>", "<", "x", "<think></think>", "\n"])
def test_two_megabytes_are_no_trouble(unit):
    text = unit * (2_000_000 // len(unit))
    inside = re.sub("think|answer", "x", text)
    assert grade(text).reward == 0.0
    assert grade(f"<think>{inside}</think><answer>{inside}</answer>").reward == 1.0


@pytest.mark.parametrize(
    "part", ["reasoning process here.", " Reasoning  process\nhere ", "…", "...", "answer here!"]
)
def test_the_prompt_s_example_with_a_little_changed_is_still_a_copy(part):
    for response in (
        f"<think>{part}</think><answer>4</answer>",
        f"<think>2 + 2</think><answer>{part}</answer>",
    ):
        assert grade(response).reward == 0.0
    assert grade("<think>the answer here is 4</think><answer>4</answer>").reward == 1.0
