"""Reward functions written for other libraries get what those libraries give, and mean the same."""

import asyncio
import re
import textwrap
from types import SimpleNamespace

import pytest
from r1_grading import Grade, RewardPool
from r1_grading.reward_signatures import adapt_signature
from refusals import refused

from megatron_r1.base.errors import Cause

ROW = {"question": "2 + 11 = ?", "level": 3, "num_tokens": 7, "thought_opened": True}


def as_verl_calls(function, row, text, truth):
    """verl's NaiveRewardManager: four names, and the score of a mapping."""
    score = function(
        data_source=row.get("data_source"),
        solution_str=text,
        ground_truth=truth,
        extra_info=row.get("extra_info", {}),
    )
    return score["score"] if isinstance(score, dict) else score


def as_trl_calls(function, row, text, truth, is_chat):
    """TRL's GRPOTrainer with one completion: names and lists, the columns of its data set; a None
    is left out of the sum over functions."""
    columns = {name: [row[name]] for name in ("level", "answer") if name in row}
    if is_chat:
        prompts = [[{"role": "user", "content": row["question"]}]]
        completions = [[{"role": "assistant", "content": text}]]
    else:
        prompts, completions = [row["question"]], [text]
    rewards = function(prompts=prompts, completions=completions, **columns)
    if asyncio.iscoroutine(rewards):
        rewards = asyncio.run(rewards)
    return sum(reward for reward in rewards if reward is not None)


def exact(data_source, solution_str, ground_truth, extra_info=None):
    return 1.0 if solution_str.endswith(ground_truth) else -1.0


def detailed(data_source, solution_str, ground_truth, extra_info, **kwargs):
    found = re.findall(r"\d+", solution_str)
    return {"score": float(found[-1:] == [ground_truth]), "pred": found, "split": extra_info}


def by_source(solution_str, ground_truth, data_source="?", **kwargs):
    return data_source == "gsm8k"


async def awaited_verl(data_source, solution_str, ground_truth, extra_info=None):
    await asyncio.sleep(0)
    return len(solution_str) / 100


@pytest.mark.parametrize("text", ["it is 13", "it is 12", ""])
@pytest.mark.parametrize("row", [ROW, ROW | {"data_source": "gsm8k", "extra_info": {"index": 4}}])
@pytest.mark.parametrize("function", [exact, detailed, by_source])
def test_a_function_of_verl_means_what_it_does_there(function, row, text):
    grade = adapt_signature(function, "m:f")(text, "13", **row)
    assert isinstance(grade, Grade) and grade.is_graded
    assert grade.reward == as_verl_calls(function, row, text, "13")


def lengths(completions, **kwargs):
    return [0.5 * len(completion) for completion in completions]


def right(prompts, completions, answer, **kwargs):
    pairs = zip(prompts, completions, answer, strict=True)
    return [float(c.endswith(a) and p.endswith("?")) for p, c, a in pairs]


def right_by_kwargs(completions, **kwargs):
    pairs = zip(completions, kwargs["answer"], strict=True)
    return [float(completion.endswith(answer)) for completion, answer in pairs]


def in_chat(completions, level, **kwargs):
    contents = [completion[0]["content"] for completion in completions]
    assert all(completion[0]["role"] == "assistant" for completion in completions)
    return [n if text else None for n, text in zip(level, contents, strict=True)]


def quiet_in_chat(prompts, completions, **kwargs):
    try:
        return [len(prompts[0][-1]["content"] + completions[0][0]["content"])]
    except TypeError:
        return [0.0]


def _completion_texts(completions):
    return [completion[0]["content"] for completion in completions]


async def by_helper(completions, **kwargs):
    await asyncio.sleep(0)
    return [-float(len(text)) for text in _completion_texts(completions)]


@pytest.mark.parametrize("text", ["it is 13", "it is 12", ""])
@pytest.mark.parametrize(
    ("function", "is_chat"),
    [
        *((lengths, False), (right, False), (right_by_kwargs, False)),
        *((in_chat, True), (quiet_in_chat, True), (by_helper, True)),
    ],
)
def test_a_function_of_trl_means_what_it_does_there(function, is_chat, text):
    grade = adapt_signature(function, "m:f")(text, "13", **ROW)
    assert isinstance(grade, Grade) and grade.is_graded
    assert grade.reward == as_trl_calls(function, ROW | {"answer": "13"}, text, "13", is_chat)


def test_a_row_s_own_column_wins_over_the_truth_and_an_option_over_the_form():
    own = ROW | {"answer": "12"}
    assert adapt_signature(right_by_kwargs, "m:f")("it is 12", "13", **own).reward == 1
    messages = {"completions": "messages"}
    assert adapt_signature(lengths, "m:f")("it is 12", "13", **ROW, **messages).reward == 0.5
    with pytest.raises(TypeError, match="completions: messages"):
        adapt_signature(right, "m:f")("13", "13", **ROW | {"completions": "text", "answer": 13})


def trl_scores(completions, **kwargs):
    return SimpleNamespace(tolist=lambda: [0.25])  # as an array of numpy or a tensor has it


@pytest.mark.parametrize("result", [0.5, [], [0.5, 0.5], ["1"], None])
def test_what_trl_would_not_accept_is_an_error(result):
    assert adapt_signature(trl_scores, "m:f")("13", "13").reward == 0.25
    with pytest.raises(TypeError):
        adapt_signature(lambda completions, **kwargs: result, "m:f")("13", "13")


@pytest.mark.parametrize("result", [{"acc": 1}, None, "1", float("nan"), float("inf")])
def test_what_verl_would_not_accept_is_an_error(result):
    with pytest.raises((TypeError, ValueError)):
        adapt_signature(lambda solution_str, ground_truth: result, "m:f")("13", "13")


@pytest.mark.parametrize(
    ("function", "library"),
    [
        (lambda queries, prompts, labels: 1, "OpenRLHF"),
        (lambda args, sample, **kwargs: 1, "slime"),
        (lambda prompt, completion, answer, state: 1, "verifiers"),
    ],
)
def test_a_signature_of_a_library_that_is_not_accepted_is_named(function, library):
    with refused("m:f", Cause.UNSUPPORTED, library, "response"):
        adapt_signature(function, "m:f")


def test_a_parameter_by_its_former_name_is_refused():
    with refused("m:f", Cause.UNSUPPORTED, "thought_opened"):
        adapt_signature(lambda response, truth, opened=False, **entry: Grade(1.0), "m:f")


def test_all_of_them_work_in_a_worker(tmp_path, monkeypatch):
    (tmp_path / "of_others.py").write_text(
        textwrap.dedent("""
        import asyncio
        from r1_grading import Grade

        class Loop:
            loop = None

        async def own(response, truth, **entry):
            await asyncio.sleep(0)
            same, Loop.loop = Loop.loop in (None, id(asyncio.get_running_loop())), id(
                asyncio.get_running_loop())
            return Grade(float(same and response == truth), "own")

        async def verl(data_source, solution_str, ground_truth, extra_info=None):
            return {"score": -1.5, "pred": solution_str}

        def trl(completions, answer, steps, **kwargs):
            return [float(c[0]["content"] == a) for c, a in zip(completions, answer)]

        async def broken(completions, **kwargs):
            raise KeyError("metadata")
        """)
    )
    monkeypatch.syspath_prepend(str(tmp_path))

    async def scenario():
        async with RewardPool(1, 600.0) as pool:
            grades = [await pool.grade("of_others:own", "13", "13") for _ in range(2)]
            grades.append(await pool.grade("of_others:verl", "13", "13", question="?"))
            grades.append(await pool.grade("of_others:trl", "13", "13", question="?", steps=2))
            lacking = await pool.grade("of_others:trl", "13", "13", question="?")
            return grades, lacking, await pool.grade("of_others:broken", "13", "13")

    grades, lacking, broken = asyncio.run(scenario())
    assert [grade.reward for grade in grades] == [1, 1, -1.5, 1]
    assert "pred 13" in grades[2].reason
    assert not lacking.is_graded and lacking.missing == ("steps",)
    assert not broken.is_graded and "of_others.py:" in broken.reason
