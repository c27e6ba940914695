"""Episodes of scripted policies end with the right status, tokens and rewards."""

import asyncio
import json
from array import array
from types import SimpleNamespace

import msgspec
import pytest
from r1_grading import Grade

from megatron_r1.agents.environment import (
    describe_environment,
    environment_target,
    find_environment,
)
from megatron_r1.agents.environment_pool import EnvironmentPool
from megatron_r1.agents.environment_prompts import load_environment_prompts
from megatron_r1.agents.hermes_parser import parse_hermes
from megatron_r1.agents.player import EpisodePlayer
from megatron_r1.base.errors import RunError
from megatron_r1.config import AgentsConfig
from megatron_r1.controller.rollouts.group_records import decode, encode, from_record, to_record
from megatron_r1.controller.rollouts.metrics import rollout_metrics
from megatron_r1.controller.rollouts.response_grader import ResponseGrader, check_grades
from megatron_r1.controller.rollouts.response_lines import response_lines
from megatron_r1.controller.rollouts.rollout import Group, Rollout
from megatron_r1.data.prompt import make_prompt
from megatron_r1.data.prompt_tokenizer import PromptTokenizer
from megatron_r1.engines.server.errors import EngineError
from megatron_r1.engines.server.responses import Response
from tests.harness.chat_tokenizer import chat_tokenizer

COUNTER = "tests.unit.agents.own_environments:Counter"
UNGRADING = "tests.unit.agents.own_environments:Ungrading"
ROW = make_prompt("?", "environment", 3, {})


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    chat_tokenizer().save_pretrained(folder)
    return PromptTokenizer(str(folder), "chat")


def call(name, **arguments):
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def play(
    text,
    answers,
    environment=COUNTER,
    row=ROW,
    max_tokens=2000,
    max_model_len=4000,
    ending="stop",
    **settings,
):
    """Play an episode whose policy gives `answers`, one a turn; an exception is an engine's.
    ending: the finish reason of an answer that is not cut."""
    config = AgentsConfig(environment=environment, **settings)
    said = iter(answers)

    async def generate(token_ids, limit):
        answer = next(said)
        if isinstance(answer, Exception):
            raise answer
        ids = [*text.hf_tokenizer.encode(answer, add_special_tokens=False), text.end]
        reason = ending if len(ids) <= limit else "length"
        ids = array("i", ids[:limit])
        version = len(token_ids) % 3
        return Response(
            ids, array("f", [-1.0] * len(ids)), array("i", [version] * len(ids)), reason
        )

    async def run():
        description = describe_environment(find_environment(environment_target(environment)))
        settings = config.model_copy(update={"environment": environment, "call_seconds": 10_000.0})
        environments = EnvironmentPool(settings, description)
        try:
            return await EpisodePlayer(text, environments, config, max_model_len).play(
                row, generate, max_tokens
            )
        finally:
            await environments.close()

    return asyncio.run(run())


def test_an_episode_with_calls_is_done_and_its_turns_are_kept(text):
    answers = [call("add") + call("add", number=4), call("fail", reason="x"), call("no"), "Done."]
    played = play(text, answers, system="Count.")
    episode = played.episode
    assert (episode.status, played.reward, played.text) == ("done", 2.0, "Done.")
    assert (episode.num_tool_calls, episode.num_tool_errors) == (4, 2)
    turns = ["assistant", "tool", "tool", "assistant", "tool", "assistant", "tool", "assistant"]
    roles = ["system", "user", *turns]
    assert [turn.role for turn in episode.turns] == roles
    assert [turn.trained for turn in episode.turns] == [role == "assistant" for role in roles]
    assert [turn.text for turn in episode.turns if turn.trained] == answers
    (branch,) = episode.branches
    assert sum(turn.num_tokens for turn in episode.turns) == len(branch.token_ids)
    trained = [t for t, flag in zip(branch.token_ids, branch.is_sampled, strict=True) if flag]
    assert text.hf_tokenizer.decode(trained) == "".join(f"{answer}<|im_end|>" for answer in answers)
    assert "'no'" in text.decode(branch.token_ids)


@pytest.mark.first_cases(2)
@pytest.mark.parametrize(
    ("answers", "settings", "status", "reward"),
    [
        ([call("add")] * 2, {"max_turns": 2}, "max_turns", -1.0),
        ([call("add", number=1), "x" * 500], {"max_tokens": 200}, "max_tokens", -2.0),
        ([call("sleep", seconds=10_000)], {"timeout_seconds": 0.3}, "agent_timeout", -3.0),
        ([call("stuck")], {"timeout_seconds": 0.3}, "agent_timeout", 0.0),
        ([call("add", number=100), "never"], {}, "done", 97.0),
        ([call("add", number=13), "x"], {}, "environment_error", None),
        ([call("add", number=14), "x"], {}, "environment_error", None),
        ([call("crash")], {}, "environment_error", None),
        ([call("add"), EngineError("lost")], {}, "engine_error", None),
        (["x"], {"max_model_len": 5}, "environment_error", None),
        (["x"], {"ending": "abort"}, "engine_error", None),
    ],
)
def test_every_end_has_its_status(text, answers, settings, status, reward):
    played = play(text, answers, **settings)
    assert played.episode.status == status
    # A process that does not answer its interruption within a second is ended, without a reward.
    assert played.reward == reward or (status == "agent_timeout" and played.reward == 0.0)
    assert played.episode.has_reward == (reward is not None)
    assert bool(played.episode.reason) == (reward is None)


def test_a_long_result_of_a_tool_is_cut_off(text):
    played = play(text, [call("fail", reason="x" * 99), "Done."], max_result_chars=20)
    (branch,) = played.episode.branches
    (result,) = (turn.text for turn in played.episode.turns if turn.role == "tool")
    assert result == "error: RuntimeError: … (cut off)"
    assert f"{result}<|im_end|>" in text.decode(branch.token_ids)


def test_half_a_surrogate_pair_does_not_end_the_run(text):
    row = make_prompt("\ud800?", "environment", 3, {})
    answers = [call("look", reason="\ud800"), call("\ud800"), "ok"]
    played = play(text, answers, UNGRADING, row)
    assert (played.episode.status, played.episode.num_tool_calls) == ("done", 2)
    assert played.episode.turns[0].text == "??"
    msgspec.json.encode(played.episode.record())


def test_what_nobody_expects_ends_one_episode_only(text):
    played = play(text, [ZeroDivisionError("oh")])
    assert (played.episode.status, played.reward) == ("protocol_error", None)
    assert played.episode.reason == "ZeroDivisionError: oh"


def test_calls_that_the_template_refuses_are_content(text, monkeypatch):
    refusing = text.hf_tokenizer.chat_template.replace(
        "{% for c in m.tool_calls or [] %}",
        "{% if m.tool_calls and m.tool_calls | length > 1 %}{{ raise_exception('one') }}{% endif %}"
        "{% for c in m.tool_calls or [] %}",
    )
    monkeypatch.setattr(text.hf_tokenizer, "chat_template", refusing)
    both = call("add") + call("add")
    played = play(text, [call("add", number=4), both])
    assert (played.episode.status, played.reward) == ("done", 1.0)  # 4 - 3
    assert played.text == both and played.episode.num_tool_calls == 1


@pytest.mark.more
def test_rows_that_differ_in_their_fields_only_are_different_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"question": "Solve the maze.", "seed": seed} for seed in range(100)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    split = load_environment_prompts(COUNTER, path=path, heldout_fraction=0.3)
    assert len({p.id for p in split.train + split.heldout}) == 100
    assert 10 < len(split.heldout) < 55
    other = tmp_path / "heldout.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in rows[:60]))
    again = load_environment_prompts(COUNTER, path=path, heldout_path=other)
    assert (len(again.train), len(again.heldout)) == (40, 60)


class Terms:
    """Grades every term by the length of the text."""

    async def grade(self, terms, prompt, text, num_tokens, thought_opened):
        return {term: Grade(len(text) / 100, term) for term in terms}


def graded(text, played, row=ROW):
    grader = ResponseGrader(None, SimpleNamespace(opens_thought=False, closed_thought=""), {})
    grader._terms = Terms()
    return asyncio.run(grader.grade_episodes(row, played, {"accuracy": 1.0, "format": 0.5}))


def test_episodes_are_graded_logged_and_measured(text):
    played = [
        play(text, [call("add", number=8), "ok"]),
        play(text, ["ok"], environment=UNGRADING),
        play(text, [call("crash")]),
    ]
    responses = graded(text, played)
    assert [each.reward for each in responses] == [5.01, 0.03, 0.0]  # 8 - 3, and len("ok") / 200
    assert [each.is_graded for each in responses] == [True, True, False]
    assert "environment_error" in responses[2].reason
    group = Group(ROW, [1], responses)
    assert from_record(decode(encode(to_record(0, group))), ROW) == group
    metrics = rollout_metrics(Rollout([group], 0.0, 0.0), policy_version=2)
    assert metrics["episode/status/environment_error"] == pytest.approx(1 / 3)
    assert metrics["episode/turns"] == pytest.approx(4 / 3)
    assert metrics["reward/mean"] == pytest.approx((5.01 + 0.03) / 2)
    line = response_lines([group], 1, "train", None)[0]
    assert (line["status"], line["turns"][1]["role"]) == ("done", "assistant")
    assert [turn["trained"] for turn in line["turns"]] == [False, True, False, True]
    with pytest.raises(RunError, match="1 of 3 .*1 environment_error"):
        check_grades([group], 0.0)


@pytest.mark.parametrize(
    ("text", "calls", "content", "thought"),
    [
        ('a<tool_call>{"name": "f", "arguments": {"x": 1}}', [("f", {"x": 1})], "a", None),
        ("<think>hm</think>\n\nb", [], "b", "hm"),
        ("<tool_call>{nothing}</tool_call>", [], "<tool_call>{nothing}</tool_call>", None),
        ('<tool_call>{"name": 1}</tool_call>', [], '<tool_call>{"name": 1}</tool_call>', None),
        ("<tool_call>[]</tool_call>", [], "<tool_call>[]</tool_call>", None),
        (
            '<think>a</think><tool_call>{"name": "f", "arguments": "{}"}</tool_call>',
            *([("f", {})], "", "a"),
        ),
        (" \n<think> hm</think> b </think>", [], "b </think>", "hm"),
        pytest.param(" " * 400_000 + "b", [], " " * 400_000 + "b", None, id="in linear time"),
    ],
)
def test_hermes(text, calls, content, thought):
    parsed = parse_hermes(text)
    functions = [call["function"] for call in parsed.tool_calls]
    assert [(f["name"], json.loads(f["arguments"])) for f in functions] == calls
    assert (parsed.content, parsed.reasoning) == (content, thought)
