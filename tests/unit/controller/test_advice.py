"""Which rollouts are said to teach nothing, and what is said."""

from array import array
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from megatron_r1.config import Config
from megatron_r1.controller.advice import find_advice
from megatron_r1.controller.rollouts.rollout import GradedResponse, Group, Rollout
from megatron_r1.data.prompt import Prompt
from megatron_r1.engines.server.responses import Response
from megatron_r1.reporting.run_folder import RunFolder
from megatron_r1.reporting.run_report import write_run_report

CASES = yaml.safe_load(Path(__file__).with_name("advice.yaml").read_text(encoding="utf-8"))
PROMPT = Prompt("q", "59 + 63?", "math", "122", {})
TAGGED = "<think>hm</think><answer>7</answer>"


def graded(text=TAGGED, right=0.0, finish="stop", reason="wrong: 7, expected 122", **rewards):
    response = Response(array("i", [1]), array("f", [0.0]), array("i", [0]), finish, b"")
    rewards = {"accuracy": right, "format": 0.0, **rewards}
    return GradedResponse(response, text, rewards, right, f"{reason}; no <think>")


def rollout(*groups, prompt_ids=(5, 6)):
    return Rollout([Group(PROMPT, list(prompt_ids), list(each)) for each in groups], 1.0, 1.0)


def config(**sections):
    return Config.model_validate({"rl": {"group_size": 2}, **sections})


MIXED = (graded(), graded(right=1.0))


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case["groups"])[:60])
def test_each_fault_is_named_with_its_numbers_and_the_setting(case):
    more = case.get("and", {"times": 0, "group": []})
    groups = case["groups"] + [more["group"]] * more["times"]
    made = [[graded(**response) for response in group] for group in groups]
    found = find_advice(rollout(*made), config(**case.get("settings", {})))
    assert found.keys() == set(case.get("topics", ()))
    first = next(iter(found.values()), "")
    assert [word for word in case.get("shows", ()) if word not in first] == [], first


def test_longer_responses_are_not_advised_where_none_is_right():
    found = find_advice(rollout((graded(finish="length"), graded())), config())["length"]
    assert "1 of 2 " in found and "data.template" in found and "raise" not in found


def test_a_start_token_that_template_and_tokenizer_both_have_is_seen():
    found = find_advice(rollout(MIXED, prompt_ids=(0, 0, 5)), config())
    assert "token 0" in found["prompt"]
    assert not find_advice(rollout(MIXED, prompt_ids=(0,)), config())


def test_a_reward_of_ones_own_is_not_blamed_on_the_form_of_answers():
    own = replace(PROMPT, kind="mine:unit")
    group = Group(own, [5, 6], [graded("7", reason="7, not 122"), graded("no number")])
    found = find_advice(Rollout([group], 1.0, 1.0), config(rewards={"reading": "strict"}))
    assert "rewards.reading" not in found["accuracy"]


def test_ungraded_responses_are_not_called_wrong():
    broken = GradedResponse(graded().response, "", {"accuracy": 0.0}, 0.0, "", ("accuracy",), False)
    assert "accuracy" not in find_advice(rollout((broken, broken)), config())


def test_the_report_shows_it(tmp_path):
    folder = RunFolder(tmp_path)
    folder.append_metrics({"step": 1, "accuracy": 0.0})
    folder.append_advice({"step": 1, "topic": "accuracy", "text": "0 of 2 <answer> are right"})
    assert "Step 1: 0 of 2 &lt;answer&gt; are right." in write_run_report(folder).read_text()
    folder.truncate_after(0)
    assert folder.read_advice() == []
