"""Several teachers: which of them a question has, what the run says of them, and which recipes
are refused."""

import asyncio
from array import array

import pytest
from refusals import refused

from megatron_r1.base.errors import Cause
from megatron_r1.commands.run_facts import describe_teachers
from megatron_r1.config import Config
from megatron_r1.controller.rollouts.rollout import GradedResponse, Group
from megatron_r1.controller.rollouts.teacher_fleets import TeacherFleets, teacher_source
from megatron_r1.data.prompt import make_prompt
from megatron_r1.engines.server.responses import Response

MATH = make_prompt("1 + 1", "math", "2", {"data_source": "gsm8k"})
CODE = make_prompt("print 1", "code", "1", {})
GAME = make_prompt("24", "gym", "1", {"dataset": "countdown"})


class ConstantTeacher:
    """An engine whose log-probabilities are all the same, and which counts its calls."""

    def __init__(self, logprob):
        self.logprob, self.calls, self.started, self.is_closed = logprob, [], None, False

    async def start(self, path):
        self.started = path

    async def compute_logprobs(self, token_ids, first, *, step):
        self.calls.append((list(token_ids), first, step))
        return array("f", [self.logprob] * (len(token_ids) - first))

    def metrics(self):
        return {"engines/up": 2, "engines/restarts": len(self.calls)}

    async def close(self):
        self.is_closed = True


@pytest.fixture
def teachers():
    fleets = {
        "": ConstantTeacher(-1.0),
        "gsm8k": ConstantTeacher(-2.0),
        "code": ConstantTeacher(-3.0),
    }
    return TeacherFleets(fleets, {"": "all", "gsm8k": "sums", "code": "programs"})


def test_a_data_source_goes_before_the_kind_and_others_have_the_default():
    assert teacher_source(MATH, ["math", "gsm8k"]) == "gsm8k"
    assert teacher_source(MATH, ["math", "code"]) == "math"
    assert teacher_source(CODE, ["code"]) == "code"
    assert teacher_source(GAME, ["math", "code"]) == ""


def test_each_question_has_logprobs_of_its_own_teacher(teachers):
    async def compute():
        await teachers.start()
        logprobs = [
            list(await teachers.compute_logprobs(prompt, [5, 6, 7], 1, step=4))
            for prompt in (MATH, CODE, GAME)
        ]
        await teachers.close()
        return logprobs

    assert asyncio.run(compute()) == [[-2.0, -2.0], [-3.0, -3.0], [-1.0, -1.0]]
    assert {fleet.started for fleet in teachers.fleets.values()} == {"all", "sums", "programs"}
    assert all(fleet.is_closed for fleet in teachers.fleets.values())
    assert [fleet.calls for fleet in teachers.fleets.values()] == [[([5, 6, 7], 1, 4)]] * 3
    assert teachers.metrics() == {"engines/up": 6, "engines/restarts": 3}


def graded(prompt, *pairs):
    responses = [
        GradedResponse(
            Response(
                array("i", [1] * len(own)), array("f", own), array("i", [0] * len(own)), "stop"
            ),
            "",
            {},
            0.0,
            "",
            teacher_logprobs=None if teacher is None else array("f", teacher),
        )
        for own, teacher in pairs
    ]
    return Group(prompt, [1], responses)


def test_kl_is_the_mean_over_the_tokens_of_each_teacher(teachers):
    groups = [
        graded(MATH, ([-1.0, -1.0], [-1.5, -2.5]), ([-1.0], [-4.0])),
        graded(MATH, ([], [])),
        graded(GAME, ([-2.0], [-1.0]), ([-9.0], None)),
    ]
    # (0.5 + 1.5 + 3) / 3; no question of code was drawn.
    assert teachers.kl_by_source(groups) == {"teacher/kl/gsm8k": 5 / 3, "teacher/kl/others": -1.0}
    assert TeacherFleets({"": ConstantTeacher(0.0)}, {"": "all"}).kl_by_source(groups) == {}


def recipe(**by_source):
    return Config(teacher={"path": "t", "by_source": by_source})


def test_the_run_says_how_many_questions_each_teacher_has():
    prompts = [MATH, CODE, CODE, GAME]
    [line] = describe_teachers(recipe(gsm8k={"path": "m"}, code={"path": "c"}), prompts)
    assert line == "teachers: 1 of gsm8k, 2 of code, 1 of others"
    assert describe_teachers(recipe(), prompts) == []


def test_a_refusal_names_the_most_frequent_sources():
    rows = [make_prompt(str(n), "math", "1", {"source": f"url{n}"}) for n in range(3000)]
    with refused("teacher.by_source.gsm8k", Cause.UNKNOWN, "math", "2,993 more") as error:
        describe_teachers(recipe(gsm8k={"path": "m"}), rows)
    assert len(str(error.value)) < 300


def test_a_teacher_without_questions_is_refused():
    with refused("teacher.by_source.gsm8", Cause.UNKNOWN, "gsm8k", "countdown", "code"):
        describe_teachers(recipe(gsm8={"path": "m"}), [MATH, CODE, GAME])
