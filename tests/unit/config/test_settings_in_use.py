"""Settings that no example sets, each through the code that reads it."""

import json
from array import array

import pytest
from refusals import refused
from small_qwen2 import MODEL

from megatron_r1.base.errors import Cause
from megatron_r1.commands import sample
from megatron_r1.config import Config, parse_recipe
from megatron_r1.controller.push.pusher import create_pusher
from megatron_r1.controller.rollouts.response_lines import response_lines
from megatron_r1.controller.rollouts.rollout import GradedResponse, Group
from megatron_r1.data.prompt import make_prompt
from megatron_r1.engines.server.recipe_settings import fleet_settings
from megatron_r1.engines.server.responses import Response


@pytest.mark.parametrize("section", ["rollout", "teacher"])
def test_request_timeout_is_an_argument_of_the_fleet(section):
    config = parse_recipe({section: {"request_timeout_seconds": 7}})
    assert fleet_settings(getattr(config, section))["request_timeout_seconds"] == 7


@pytest.mark.parametrize(
    ("dtype", "tolerance", "expected"),
    [("float32", None, 1e-3), ("bfloat16", None, 0.3), ("bfloat16", 0.02, 0.02)],
)
def test_probe_tolerance_replaces_that_of_the_dtype(tmp_path, dtype, tolerance, expected):
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    config = parse_recipe(
        {
            "model": {"path": str(tmp_path), "dtype": dtype},
            "rollout": {"dtype": dtype},
            "push": {"probe_tolerance": tolerance},
        }
    )
    pusher = create_pusher(config, trainer=None, fleet=None, probes=[[1, 2]])
    assert pusher.prober.tolerance == expected


def test_log_samples_is_the_number_of_records_of_a_step():
    empty = Response(array("i"), array("f"), array("i"), "stop")
    groups = [
        Group(
            make_prompt(f"{i} + 1?", "math", "1", {}), [1], [GradedResponse(empty, "", {}, 0, "")]
        )
        for i in range(10)
    ]
    for limit in (
        Config().run.log_samples,
        parse_recipe({"run": {"log_samples": 3}}).run.log_samples,
    ):
        assert len(response_lines(groups, 1, "train", limit)) == limit


def test_with_fewer_groups_more_responses_of_each_are_recorded():
    empty = Response(array("i"), array("f"), array("i"), "stop")
    groups = [
        Group(
            make_prompt(question, "math", "1", {}),
            [1],
            [GradedResponse(empty, f"{question}{place}", {}, 0, "") for place in range(4)],
        )
        for question in "ab"
    ]
    for limit, texts in ((2, "a0 b0"), (5, "a0 b0 a1 b1 a2"), (9, "a0 b0 a1 b1 a2 b2 a3 b3")):
        records = response_lines(groups, 1, "train", limit)
        assert [record["response"] for record in records] == texts.split()


@pytest.mark.parametrize(("words", "is_avoided"), [(4, True), (5, False), (0, False)])
def test_decontaminate_ngram_is_the_number_of_shared_words(tmp_path, words, is_avoided):
    rows = [{"question": "one two three four five", "truth": "1"}]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "avoid.jsonl").write_text('{"question": "zero one two three four"}\n')
    config = parse_recipe(
        {
            "run": {"folder": str(tmp_path / "run")},
            "data": {"path": str(tmp_path / "asked.jsonl"), "heldout_fraction": 0},
            "sample": {
                "decontaminate": [str(tmp_path / "avoid.jsonl")],
                "decontaminate_ngram": words,
                "server": {"url": "http://127.0.0.1:9", "model": "m"},
                "rewrite": "no_such_module:f",  # is read after the questions
            },
        }
    )
    refusal = (
        ("sample.decontaminate", Cause.EMPTY) if is_avoided else ("sample.rewrite", Cause.NOT_FOUND)
    )
    with refused(*refusal):
        sample.run(config)
