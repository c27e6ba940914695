"""`megatron-r1 why` on what a run wrote down: faults planted in logs, files and metrics are named.
What needs weights: tests/system/test_why_runs.py."""

import asyncio
import itertools
import json
import math
import statistics
from array import array
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from chat_tokenizer import chat_tokenizer
from r1_grading import Grade
from refusals import refused
from small_qwen2 import MODEL

from megatron_r1.base.errors import Cause, RunError
from megatron_r1.base.files.framed_records import append_frame
from megatron_r1.commands.score import audit_option
from megatron_r1.commands.why import run
from megatron_r1.config import Config, RLConfig
from megatron_r1.config.algorithms import ALGORITHMS
from megatron_r1.controller import algorithms
from megatron_r1.controller.algorithms import grpo
from megatron_r1.controller.corrections import reward_normalization
from megatron_r1.controller.rollouts.rollout import GradedResponse, Group
from megatron_r1.controller.rollouts.sample_log import SamplingRecord, encode, to_record
from megatron_r1.data.prompt_tokenizer import PromptTokenizer
from megatron_r1.data.prompts import load_prompts
from megatron_r1.data.sampler import EpochSampler, PromptSampler
from megatron_r1.engines.server.responses import Response
from megatron_r1.models.sampling_mask import encode_mask
from megatron_r1.reporting.run_folder import RunFolder
from megatron_r1.trainer.checkpoints.checkpoint_folders import checkpoint_path
from megatron_r1.trainer.checkpoints.manifest import write_manifest
from megatron_r1.why import all_checks, formulas, page
from megatron_r1.why.all_checks import examine_step
from megatron_r1.why.checks import (
    checkpoints,
    files,
    loss,
    questions,
    regraded_rewards,
    rewards,
    sampling,
    schedule,
    update_tolerances,
)
from megatron_r1.why.comparison import Comparison
from megatron_r1.why.record.examinable_steps import choose_step, examinable_steps, open_run
from megatron_r1.why.record.recorded_step import RecordedStep
from megatron_r1.why.record.step_reader import read_step
from megatron_r1.why.step_report import Report
from megatron_r1.why.update.recomputation import Recomputation, RecomputedUpdates
from megatron_r1.why.update.run_differences import RunDifferences
from megatron_r1.why.update.term_coefficients import TermFit
from tests.grading.code_answers import needs_sandbox

STEP = 2
SYSTEM = "Answer with one number."
LIMIT = 64
WEIGHTS = {"accuracy": 1.0, "format": 0.1}


class Planted:
    """A run of two groups of two responses, each half of it right, to change before it is written.

    Attributes:
        settings: sections of the recipe.
        line: the step's line of metrics.jsonl; filled where it is empty."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = folder / "model"
        tokenizer = chat_tokenizer()
        tokenizer.save_pretrained(self.model)
        size = len(tokenizer)
        (self.model / "config.json").write_text(json.dumps(MODEL | {"vocab_size": size}))
        rows = [
            {
                "question": [
                    {"role": "system", "content": SYSTEM},
                    {"role": "user", "content": f"{at} + 1 = ?"},
                ],
                "truth": str(at + 1),
            }
            for at in range(2, 22)
        ]
        data = folder / "questions.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.settings = {
            "run": {"folder": str(folder / "run"), "steps": 4},
            "model": {"path": str(self.model), "dtype": "float32"},
            "data": {"path": str(data), "template": "chat", "num_heldout": 0},
            "rollout": {"max_response_tokens": LIMIT, "dtype": "float32"},
            "rl": {"prompts_per_rollout": 2, "group_size": 4, "minibatches": 2},
            "optimizer": {"warmup_updates": 2},
        }
        self.tokenizer = PromptTokenizer(str(self.model), "chat")
        self.sampling = SamplingRecord(1.0, 1.0, LIMIT, tuple(self.tokenizer.stop_token_ids), ())
        prompts = load_prompts(path=data, num_heldout=0).train[:2]
        self.groups = [
            Group(
                prompt,
                self.tokenizer.encode(prompt.question, prompt.messages_before),
                [
                    self.response(
                        f"<think></think><answer>{int(prompt.truth) + wrong}</answer>", wrong
                    )
                    for wrong in (0, 1, 0, 1)
                ],
            )
            for prompt in prompts
        ]
        self.line = {
            "learning_rate": 3e-6,
            "optimizer_step": 4,
            "step_taken": 1.0,
            "grad_norm": 1.0,
        }

    def response(self, text: str, wrong: int) -> GradedResponse:
        tokens = array("i", self.tokenizer.encode_response(text))
        count = len(tokens)
        made = Response(
            tokens,
            array("f", [-0.5] * count),
            array("i", [STEP - 1] * count),
            "stop",
            b"",
            "engine-0",
        )
        terms = {"accuracy": 1.0 - wrong, "format": 1.0}
        return GradedResponse(made, text, terms, 1.1 - wrong, "graded")

    def change(self, function, group: int | None = None) -> None:
        """Change the responses of a group, or of all."""
        for at, each in enumerate(self.groups):
            if group in (None, at):
                each.responses[:] = [function(graded) for graded in each.responses]

    def read(self) -> RecordedStep:
        """Write the run and read the step."""
        folder = RunFolder(self.folder / "run")
        folder.sample_log.mkdir(parents=True, exist_ok=True)
        folder.write_config(Config.model_validate(self.settings).model_dump())
        with open(folder.sample_log / f"step_{STEP:08d}.log", "wb", buffering=0) as file:
            for position, group in enumerate(self.groups):
                append_frame(file.fileno(), encode(to_record(position, group, "", self.sampling)))
        responses = [each for group in self.groups for each in group.responses]
        means = {
            "reward/mean": statistics.fmean(each.reward for each in responses),
            "accuracy": statistics.fmean(each.rewards["accuracy"] for each in responses),
            "truncated": statistics.fmean(each.is_truncated for each in responses),
        }
        if not folder.metrics_path.exists():
            folder.append_metrics({"step": STEP, **means, **self.line})
        return read_step(*open_run(folder.path), STEP)


@pytest.fixture
def planted(tmp_path) -> Planted:
    return Planted(tmp_path)


def checks(step: RecordedStep) -> list[Comparison]:
    return [
        *files.compare_files(step),
        *sampling.compare_sampling(step),
        *rewards.compare_recorded_rewards(step),
    ]


def named(step: RecordedStep) -> Comparison:
    """The first departure, with all that departs in the message of a failure."""
    found = [each for each in checks(step) if each.differs]
    assert found, [str(each) for each in checks(step)]
    return found[0]


def test_nothing_departs_in_a_run_without_a_fault(planted):
    found = checks(planted.read())
    assert [str(each) for each in found if each.differs] == []
    assert [each.name for each in found if each.status == "not checked"] == []


def test_responses_that_are_cut_off_have_no_advantage_where_the_run_masks_them(planted):
    response = planted.groups[0].responses[1].response
    planted.groups[0].responses[1] = replace(
        planted.groups[0].responses[1], response=replace(response, finish_reason="length")
    )
    trained = planted.read().advantages
    (planted.folder / "run/config.yaml").unlink()
    planted.settings["rl"]["truncated"] = "mask"
    masked = planted.read().advantages
    assert not math.isnan(trained[0][1]) and math.isnan(masked[0][1])
    assert masked[0][::2] == trained[0][::2] and masked[1] == trained[1]


def test_nothing_departs_in_a_run_with_a_cut(planted):
    cut(planted, lambda token: [token, token + 1])
    found = checks(planted.read())
    assert [str(each) for each in found if each.differs] == []
    assert "tokens that the engines kept" in [each.name for each in found]


def doubled_start(planted):
    planted.groups[0].prompt_ids.insert(0, planted.groups[0].prompt_ids[0])


def without_system(planted):
    group = planted.groups[1]
    planted.groups[1] = replace(group, prompt_ids=planted.tokenizer.encode(group.prompt.question))


def other_template(planted):
    group = planted.groups[1]
    text = group.prompt.question
    planted.groups[1] = replace(group, prompt_ids=planted.tokenizer.hf_tokenizer.encode(text))
    group.prompt.messages_before.clear()


def past_the_end(planted):
    def longer(graded):
        tokens = graded.response.token_ids + graded.response.token_ids
        count = len(tokens)
        response = replace(
            graded.response,
            token_ids=tokens,
            logprobs=array("f", [-0.5] * count),
            policy_versions=array("i", [STEP - 1] * count),
        )
        text = planted.tokenizer.decode(tokens)
        return replace(graded, response=response, text=text)

    planted.change(longer, group=0)
    planted.sampling = replace_record(planted.sampling, stop_token_ids=(0,))


def end_with_another_token(planted, logprob: float) -> None:
    """Have a special token that is no end token stand in front of each response's end token."""
    (other,) = planted.tokenizer.hf_tokenizer.convert_tokens_to_ids(["<|im_start|>"])

    def with_other(graded):
        response = graded.response
        tokens = array("i", [*response.token_ids[:-1], other, response.token_ids[-1]])
        response = replace(
            response,
            token_ids=tokens,
            logprobs=array("f", [*response.logprobs[:-1], logprob, response.logprobs[-1]]),
            policy_versions=array("i", [STEP - 1] * len(tokens)),
        )
        return replace(graded, response=response, text=planted.tokenizer.decode(tokens))

    planted.change(with_other)


def another_end(planted):
    end_with_another_token(planted, -0.1)


def replace_record(record, **changes):
    return SamplingRecord(
        **{name: changes.get(name, getattr(record, name)) for name in record.__struct_fields__}
    )


def beyond_the_vocabulary(planted):
    config = json.loads((planted.model / "config.json").read_text())
    (planted.model / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))


def other_text(planted):
    planted.change(lambda graded: replace(graded, text=graded.text + "?"), group=1)


def other_temperature(planted):
    planted.sampling = replace_record(planted.sampling, temperature=0.6)


def top_p(planted):
    planted.sampling = replace_record(planted.sampling, top_p=0.9)


def other_top_k(planted):
    planted.sampling = replace_record(planted.sampling, top_k=40, min_p=0.1)


def cut(planted, kept):
    """Have the run draw from a part of the vocabulary, and every token keep `kept(token)`."""
    planted.settings["rollout"] |= {"top_p": 0.9, "top_k": 8}
    planted.sampling = replace_record(planted.sampling, top_p=0.9, top_k=8)

    def with_mask(graded):
        mask = encode_mask([kept(token) for token in graded.response.token_ids])
        return replace(graded, response=replace(graded.response, sampling_mask=mask))

    planted.change(with_mask)


def without_the_token(planted):
    cut(planted, lambda token: [token, token + 1])
    with_one_less = replace(planted.groups[1].responses[2].response, sampling_mask=b"")
    planted.groups[1].responses[2] = replace(planted.groups[1].responses[2], response=with_one_less)


def stale(planted):
    def older(graded):
        versions = array("i", [STEP - 2] * len(graded.response.token_ids))
        return replace(graded, response=replace(graded.response, policy_versions=versions))

    planted.change(older, group=1)


def punished(planted):
    def cut(graded):
        response = replace(graded.response, finish_reason="length")
        return replace(graded, response=response, reward=-0.5)

    planted.change(cut, group=0)
    group = planted.groups[0]
    lengths = [len(each.response.token_ids) for each in group.responses]
    planted.settings["rollout"]["max_model_len"] = len(group.prompt_ids) + min(lengths)


def cut_early(planted):
    def cut(graded):
        return replace(graded, response=replace(graded.response, finish_reason="length"))

    planted.change(cut, group=0)


def missed_hashes(planted):
    group = planted.groups[0]
    answers = [planted.response(f"So #### {group.prompt.truth}", 1) for _ in group.responses]
    group.responses[:] = [
        replace(each, rewards={"accuracy": 0.0, "format": 0.0}, reward=0.0) for each in answers
    ]


def accepted_though_wrong(planted):
    terms = {"accuracy": 1.0, "format": 1.0}
    planted.change(lambda graded: replace(graded, rewards=terms, reward=1.1), group=1)


def other_format(planted):
    def inverted(graded):
        terms = graded.rewards | {"format": 1 - graded.rewards["format"]}
        return replace(graded, rewards=terms, reward=terms["accuracy"] + 0.1 * terms["format"])

    planted.change(inverted, group=1)


def marked_ungraded(planted):
    wrong = planted.groups[0].responses[1]
    terms = wrong.rewards | {"accuracy": 0.0}
    planted.groups[0].responses[1] = replace(
        wrong, rewards=terms, reward=0.0, ungraded_terms=("accuracy",), is_graded=False
    )


def shortened(graded, count, **changes):
    """A response without its last `count` tokens."""
    made = graded.response
    parts = {
        name: getattr(made, name)[: len(made.token_ids) - count]
        for name in ("token_ids", "logprobs", "policy_versions")
    }
    return replace(graded, response=replace(made, **parts, **changes))


def without_end(planted):
    response = planted.groups[0].responses[2]
    planted.groups[0].responses[2] = shortened(response, 1)


def cut_and_called_finished(planted):
    short = shortened(planted.groups[0].responses[1], 3)
    count = len(short.response.token_ids)
    text = planted.tokenizer.decode(short.response.token_ids)
    terms = {"accuracy": 0.0, "format": 0.0}
    planted.change(lambda graded: replace(short, text=text, rewards=terms, reward=0.0))
    planted.settings["rollout"]["max_response_tokens"] = count
    planted.sampling = replace_record(planted.sampling, max_tokens=count)


def one_draw(planted):
    first = planted.groups[1].responses[0]
    logprobs = array("f", [-4.0] * len(first.response.token_ids))
    planted.change(
        lambda graded: replace(first, response=replace(first.response, logprobs=logprobs)), group=1
    )


def one_draw_of_short_responses(planted):
    """Each response is too probable to be there twice beyond chance: 1 of e^6."""
    for number, group in enumerate(planted.groups):
        first = group.responses[0]
        tokens = first.response.token_ids
        logprobs = array("f", [-6.0 / len(tokens)] * len(tokens))
        one = replace(first, response=replace(first.response, logprobs=logprobs))
        planted.change(lambda graded, one=one: one, group=number)


def other_metrics(planted):
    planted.line["accuracy"] = 0.9


PLANTS = {
    doubled_start: ("start of the prompt", "<|im_start|>", "data.template"),
    without_system: ("system message", SYSTEM, "data.template"),
    past_the_end: ("end of the response", "stop at 0 only", "rollout.stop_token_ids"),
    another_end: ("other end tokens", "<|im_start|>", "rollout.stop_token_ids"),
    beyond_the_vocabulary: ("vocabulary", "vocab_size: 300", "vocab_size"),
    other_text: ("text that was graded", "…", "tokenizer"),
    other_temperature: ("settings of the engines", "temperature 0.6", "rollout.temperature"),
    top_p: ("settings of the engines", "top_p 0.9", "rollout.top_p"),
    other_top_k: ("settings of the engines", "top_k 40", "rollout.top_k"),
    without_the_token: ("tokens that the engines kept", "kept", "rollout.top_k"),
    stale: ("version of the weights", "engine-0 sampled with version 0", "rl.staleness"),
    punished: ("sum of the terms", "4 truncated answers are punished", "rewards.weights"),
    cut_early: ("limit of the response", f"the limit is {LIMIT}", "rollout.max_response_tokens"),
    missed_hashes: ("verdict of second readers", "behind ####", "rewards.reading: auto"),
    accepted_though_wrong: ("verdict of second readers", "2 are accepted", "rewards.reading"),
    other_format: ("graded again", "format 0 was logged, now 1", "rewards.options.format"),
    marked_ungraded: ("graded again", "1 responses are marked ungraded", "rewards.options"),
    without_end: ("end token of finished responses", "lack their end token", "after the engine"),
    cut_and_called_finished: (
        "end token of finished responses",
        "8 responses are as long as the limit",
        "finish_reason",
    ),
    one_draw: ("draws of a group", "in 1 group up to 4 responses are the same tokens", "seed"),
    one_draw_of_short_responses: ("draws of a group", "probability of e^-6", "seed"),
    other_metrics: ("metrics of the rollout", "accuracy is 0.900", "metrics.jsonl"),
}


def with_programs(planted, logged):
    """The step, whose first group is of programs that are right, with logged accuracies."""
    text = "<think></think><answer>```python\nprint(int(input()) ** 2)  # {}\n```</answer>"
    responses = [
        planted.response(text.format(place), int(1 - accuracy))
        for place, accuracy in enumerate(logged)
    ]
    planted.groups[0].responses[:] = responses
    step = planted.read()
    truth = {"tests": [{"stdin": "2", "stdout": "4"}]}
    prompt = replace(step.groups[0].prompt, kind="code", truth=truth)
    step.groups[0] = replace(step.groups[0], prompt=prompt)
    return step


def test_rewards_that_request_nothing_and_run_no_program_are_called_in_the_process():
    assert set(regraded_rewards.IN_PROCESS_REWARDS) == {"math", "logic", "exact_match"}


@pytest.mark.more
@needs_sandbox
@pytest.mark.parametrize(
    ("logged", "departing_responses"),
    [((1.0, 0.0, 1.0, 0.0), [(0, 1), (0, 3)]), ((1.0, 1.0, 1.0, 1.0), [])],
)
def test_programs_run_their_tests_again(planted, logged, departing_responses):
    step = with_programs(planted, logged)
    grades = regraded_rewards.grade_again(step)
    assert all(grades[0, place]["accuracy"].reward == 1.0 for place in range(4))
    comparison = regraded_rewards.compare_regraded_rewards(step, grades)
    assert list(comparison.affected_responses) == departing_responses


@pytest.mark.first_cases(2)
@pytest.mark.parametrize(
    ("logged", "rewards", "reward"),
    [
        (1.0, (1.0,), 1.0),
        (1.0, (0.0, 0.0, 0.0), 0.0),
        (1.0, (0.0, 0.0, 1.0), None),
        (1.0, (0.0, 1.0), None),
        (1.0, (None,), None),
        (1.0, (0.0, None), None),
    ],
)
def test_a_program_that_comes_out_by_chance_or_cannot_run_is_left_out(
    planted, monkeypatch, logged, rewards, reward
):
    given, running = [], [0]

    class Pool:
        def __init__(self, *_):
            self.rewards = {}

        async def __aenter__(self):
            return self

        async def __aexit__(self, *_):
            pass

        async def grade(self, kind, response, *_, **__):
            given.append(kind)
            running.append(running[-1] + 1)
            await asyncio.sleep(0)
            running.append(running[-1] - 1)
            found = self.rewards.setdefault(response, list(rewards)).pop(0)
            return Grade.ungraded(ValueError("no sandbox")) if found is None else Grade(found, "")

    monkeypatch.setattr(regraded_rewards, "RewardPool", Pool)
    grades = regraded_rewards.grade_again(with_programs(planted, (logged,) * 4))
    assert given == ["code"] * 4 * len(rewards)
    assert max(running) > 1, "one program at a time"
    for place in range(4):
        found = grades[0, place].get("accuracy")
        assert (found and found.reward) == reward


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__)
def test_a_planted_fault_is_the_first_that_departs(planted, plant):
    plant(planted)
    comparison = named(planted.read())
    name, words, remedy = PLANTS[plant]
    assert comparison.name == name, str(comparison)
    assert words in comparison.reason
    assert remedy in comparison.remedy


def test_a_special_token_that_the_model_draws_at_random_is_no_end_token(planted):
    end_with_another_token(planted, -3.0)
    assert "other end tokens" not in [each.name for each in checks(planted.read()) if each.differs]


def test_a_response_that_ends_with_a_string_of_the_settings_needs_no_end_token(planted):
    without_end(planted)
    planted.settings["rollout"]["stop"] = ["</answer>"]
    planted.sampling = replace_record(planted.sampling, stop=("</answer>",))
    assert [str(each) for each in checks(planted.read()) if each.differs] == []


@pytest.mark.parametrize("count", [0, 1, 7, 23])
def test_the_order_of_questions_is_the_samplers(count):
    sampler = EpochSampler(range(7), 5)
    sampler.next(count)
    assert formulas.question_order(7, 5, count, 10) == sampler.next(10)


def with_order(planted, place) -> RecordedStep:
    """Have the groups of step 2 be of the questions that the seed's order has at places, and a
    checkpoint say that the run drew from the data's questions."""
    train = load_prompts(path=planted.folder / "questions.jsonl", num_heldout=0).train
    sampler = PromptSampler(train, 0)
    folder = planted.folder / f"run/checkpoints/step_{STEP:08d}"
    folder.mkdir(parents=True)
    (folder / "run_state.json").write_text(json.dumps({"sampler": sampler.state_dict()}))
    drawn = sampler.next(20)
    groups = zip(planted.groups, place, strict=True)
    planted.groups = [replace(group, prompt=drawn[at]) for group, at in groups]
    return planted.read()


@pytest.mark.parametrize(
    ("places", "words"),
    [
        ((2, 3), ""),
        ((2, 2), "all 2 groups are of one question"),
        ((0, 1), "those of step 1 once more"),
        ((3, 2), "in another order"),
        ((2, 9), "1 of 2 groups are of other questions than are due"),
    ],
)
def test_questions_other_than_those_of_the_seeds_order_depart(planted, places, words):
    (comparison,) = questions.compare_questions(with_order(planted, places))
    assert comparison.differs is bool(words) and comparison.status != "not checked"
    assert not words or words in comparison.reason


def test_a_damaged_record_of_the_sample_log_is_named_and_not_its_questions(planted):
    planted.read()
    (path,) = (planted.folder / "run/sample_log").iterdir()
    whole = path.read_bytes()
    content = bytearray(whole)
    content[-20] ^= 1
    path.write_bytes(content)
    step = read_step(*open_run(planted.folder / "run"), STEP)
    assert len(step.groups) == 1
    comparison, order = questions.compare_questions(step)
    assert comparison.differs and comparison.name == "sample log"
    assert "only 1 groups are" in comparison.reason and order.status == "not checked"
    # Bytes of a group that is there again, as a kill leaves them, are no damage.
    path.write_bytes(content[-100:] + whole)
    step = read_step(*open_run(planted.folder / "run"), STEP)
    assert len(step.groups) == 2 and step.num_damaged_bytes == 0


def test_one_question_in_all_groups_departs_where_the_order_is_not_known(planted):
    assert questions.compare_questions(planted.read())[0].status == "not checked"
    planted.groups[1] = replace(planted.groups[1], prompt=planted.groups[0].prompt)
    (comparison,) = questions.compare_questions(planted.read())
    assert comparison.differs and "all 2 groups are of one question" in comparison.reason


def test_the_responses_concerned_and_their_share_of_the_loss_are_counted(planted):
    stale(planted)
    comparison = named(planted.read())
    assert comparison.affected_responses == [(1, 0), (1, 1), (1, 2), (1, 3)]
    # Both groups have the same rewards, so each has half of the advantages.
    assert comparison.loss_fraction == pytest.approx(0.5)
    assert comparison.num_tokens == sum(
        len(g.response.token_ids) for g in planted.groups[1].responses
    )


@pytest.mark.parametrize(
    ("logged", "is_equal", "words"),
    [
        # Updates 3 and 4 of 8: 3/4 and 1/2 of what is left to decay. By hand: linear, no warm-up.
        (3e-6 * (5 / 8 + 4 / 8) / 2, True, ""),
        # As planned for 8 steps, 16 updates, before the run was shortened.
        (3e-6 * (13 / 16 + 12 / 16) / 2, True, "run.steps: 8"),
        (3e-6 / 7.03, False, "as if still in warm-up"),
    ],
)
def test_the_learning_rate_may_have_been_planned_for_another_length(
    planted, logged, is_equal, words
):
    planted.settings["optimizer"] = {"decay": "linear", "warmup_updates": 0 if is_equal else 1}
    planted.line["learning_rate"] = logged
    rate, *_ = schedule.compare_schedule(planted.read())
    assert rate.name == "learning rate"
    assert rate.differs is not is_equal and words in rate.description + rate.reason


def test_records_without_sampling_are_read_and_reported(planted):
    planted.sampling = None
    found = {each.name: each for each in sampling.compare_sampling(planted.read())}
    assert found["settings of the engines"].status == "not checked"


def test_without_checkpoints_it_says_what_is_missing(planted):
    report = examine_step(planted.read())
    reasons = {
        each.name: each.reason for each in report.comparisons if each.status == "not checked"
    }
    assert "checkpoint.keep_every" in reasons["engines' log-probabilities"]
    assert "checkpoint.keep_every" in reasons["loss"]
    assert report.first_departure is None and report.suspicions


def test_a_run_whose_groups_have_one_reward_is_suspected_to_be_too_hard(planted):
    numbers = itertools.count(1)

    def wrong(graded):
        return planted.response(f"<think></think><answer>-{next(numbers)}</answer>", 1)

    planted.change(wrong)
    report = examine_step(planted.read())
    assert report.first_departure is None
    assert any("too hard: 100.0% of the groups" in each for each in report.suspicions)


def recomputation_of(base, run, show_progress):
    """A `Recomputation` whose updates are `base`, and with any candidate cause those of `run`."""
    recomputation = SimpleNamespace(
        base=base,
        run=run,
        run_differences=RunDifferences(),
        inputs=SimpleNamespace(
            packed_rows=[], shares=list, left_out_note="", trains_mtp_layers=False
        ),
        searches_causes=True,
        estimates=SimpleNamespace(distance=lambda candidate, line: 1.0),
        fitted_clip=None,
        term_fit=TermFit((), math.inf, math.inf),
        show_progress=show_progress,
        _shown_departures=set(),
    )
    recomputation.show_departures = partial(Recomputation.show_departures, recomputation)
    return recomputation


@pytest.mark.parametrize(("logged", "departs"), [(5.75129e-4, False), (5.765e-4, True)])
def test_a_loss_of_kl_alone_has_the_rounding_of_kl(planted, logged, departs):
    """Of groups with one reward the loss is rl.kl_beta x kl, and no advantage sets its size."""
    planted.change(lambda graded: planted.response("<think></think><answer>-1</answer>", 1))
    planted.settings["rl"]["kl_beta"] = 0.01
    planted.line |= {"loss": logged, "kl": 0.0575}
    made = RecomputedUpdates(
        {"loss": 5.75139e-4, "kl": 0.0575139, "entropy": 2.0}, {}, {}, None, []
    )
    recomputed = recomputation_of(made, lambda candidate, matches_record: made, print)
    of_loss, of_kl = loss.compare_loss(planted.read(), recomputed)
    assert of_loss.differs is departs and not of_kl.differs


@pytest.mark.parametrize(
    ("distances", "is_metrics"), [((0.0, 0.0), True), ((None, None), False), ((0.0, 9.0), False)]
)
def test_a_loss_that_departs_alone_is_shown_before_the_search(planted, distances, is_metrics):
    planted.change(lambda graded: planted.response("<think></think><answer>-1</answer>", 1))
    planted.settings["rl"]["kl_beta"] = 0.01
    planted.line |= {"loss": 0.1234, "kl": 0.05}
    update_distance, moment_distance = distances
    made = RecomputedUpdates(
        *({"loss": 0.0567, "kl": 0.05, "entropy": 2.0}, {}, {}, update_distance, []),
        moment_distance,
    )
    shown = []

    def recompute(candidate, matches_record):
        assert "0.0567 recomputed" in shown[0] and "substitutions" in shown[-1]
        assert any("metrics.jsonl is the likely place" in line for line in shown) is is_metrics
        return made

    recomputed = recomputation_of(made, recompute, shown.append)
    of_loss, _ = loss.compare_loss(planted.read(), recomputed)
    assert shown and of_loss.differs
    assert ("row of step" in of_loss.remedy) is is_metrics


@pytest.mark.parametrize("explains", [True, False])
def test_a_departure_of_the_loss_is_shown_once(planted, monkeypatch, explains):
    planted.settings["rl"]["kl_beta"] = 0.01
    planted.line |= {"loss": 0.1234, "kl": 0.05}
    base, matching = (
        RecomputedUpdates({"loss": value, "kl": 0.05, "entropy": 2.0}, {}, {}, None, [])
        for value in (0.0567, 0.1234)
    )

    def compare_loss(step, recomputation):
        updates = matching if explains else base
        fake = recomputation_of(base, lambda *_: updates, recomputation.show_progress)
        fake.show_departures = recomputation.show_departures
        return loss.compare_loss(step, fake)

    monkeypatch.setattr(all_checks, "WEIGHT_CHECKS", (("loss", "loss", compare_loss),))
    shown = []
    report = examine_step(planted.read(), show_progress=shown.append)
    assert ("explains it" in report.comparison("loss", "loss").reason) is explains
    assert [line.split(":")[0] for line in shown].count("loss departs") == 1


@pytest.mark.parametrize("logged", [None, math.nan, math.inf])
def test_a_metric_that_is_no_number_departs_and_nothing_explains_it(planted, logged):
    planted.line |= {"loss": logged, "kl": 0.05}
    made = RecomputedUpdates({"loss": 1e-3, "kl": 0.05, "entropy": 2.0}, {}, {}, None, [])

    def searched(*_: object) -> None:
        raise AssertionError("no cause is searched")

    recomputed = SimpleNamespace(
        base=made,
        run=searched,
        inputs=SimpleNamespace(shares=searched, left_out_note=""),
        searches_causes=True,
    )
    step = planted.read()
    of_loss, of_kl = loss.compare_loss(step, recomputed)
    assert of_loss.differs and not of_kl.differs
    assert "loss is not a number in metrics.jsonl, 0.001 recomputed" in of_loss.reason
    assert not update_tolerances.explains_record(step, made)


@pytest.mark.parametrize(
    ("metrics", "name", "words"),
    [
        ({"step_taken": 0.5, "loss": None, "grad_norm": None}, "updates taken", "loss, grad_norm"),
        ({"step_taken": 0.5}, "updates taken", "a gradient is not finite"),
        ({"learning_rate": None}, "learning rate", "learning_rate is not a number"),
        ({"optimizer_step": None}, "number of updates", "optimizer_step is not a number"),
        ({"step_taken": None}, "updates taken", "step_taken is not a number"),
        ({"reward/mean": None}, "metrics of the rollout", "reward/mean is not a number"),
    ],
)
def test_what_is_no_number_in_the_metrics_is_named_first(planted, metrics, name, words):
    planted.line |= metrics
    first = examine_step(planted.read()).first_departure
    assert first is not None and first.name == name and words in first.reason, str(first)


def checkpoint_of(planted, step: int) -> Path:
    """Make a folder with a file, which has a manifest as a checkpoint has."""
    folder = checkpoint_path(planted.folder / "run/checkpoints", step)
    folder.mkdir(parents=True)
    (folder / "__0_0.distcp").write_bytes(b"weights")
    write_manifest(folder)
    return folder


@pytest.mark.parametrize("content", [b"weight", b"Weights"])
def test_a_damaged_checkpoint_departs_and_its_step_is_not_whole(planted, content, capsys):
    _, after = (checkpoint_of(planted, step) for step in (STEP - 1, STEP))
    (after / "__0_0.distcp").write_bytes(content)
    step = planted.read()
    first, second = checkpoints.compare_states(step)
    assert not first.differs and second.differs and second.family == "checkpoint"
    assert f"{after.name} is damaged: __0_0.distcp" in second.reason
    is_shorter = len(content) < len(b"weights")
    (found,) = examinable_steps(step.folder, step.run_config)
    assert (found.has_before, found.has_after) == (True, not is_shorter)
    with pytest.raises(RunError, match="files of the checkpoint after"):
        run(Config(), str(step.folder.path))
    printed = capsys.readouterr().out
    whole = "none" if is_shorter else str(STEP)
    assert f"steps with log and both checkpoints: {whole}\n" in printed
    assert ("damaged checkpoint: step 2: __0_0.distcp has 6 bytes" in printed) is is_shorter


def test_what_nothing_could_be_checked_of_is_in_the_headline(planted, capsys):
    planted.read()
    run(Config(), str(planted.folder / "run"))
    (line,) = (each for each in capsys.readouterr().out.splitlines() if "nothing departs" in each)
    assert line.startswith("nothing departs of what could be checked, 4 of 9 families: nothing of")
    assert "checkpoint, log-probabilities, loss, optimizer, push could be" in line
    assert line in (planted.folder / "run/why.html").read_text().replace("Nothing", "nothing")


def test_a_line_of_metrics_without_its_step_is_refused(planted):
    planted.read()
    metrics = planted.folder / "run/metrics.jsonl"
    metrics.write_text("{}\n" + metrics.read_text())
    with refused("metrics.jsonl", Cause.MALFORMED, "line 1"):
        run(Config(), str(planted.folder / "run"))


def test_the_command_fails_where_something_departs(planted, capsys):
    stale(planted)
    planted.read()
    out = planted.folder / "why.json"
    with pytest.raises(RunError, match="version of the weights"):
        run(Config(), str(planted.folder / "run"), json=str(out))
    printed = capsys.readouterr()
    assert "first quantity that departs: sampling: version of the weights" in printed.out
    assert "version of the weights departs: " in printed.err
    first = json.loads(out.read_text())["first"]
    assert first["name"] == "version of the weights" and first["family"] == "sampling"
    assert {"compared", "source", "concerned"} <= first.keys()
    page = (planted.folder / "run" / "why.html").read_text()
    assert "version of the weights" in page and "group 1, response 0" in page


@pytest.mark.parametrize(
    ("departures", "order"), [((0.1, 0.5, 0.2), [1, 2, 0]), ((), [0, 2, 1])], ids=["sizes", "alike"]
)
def test_the_page_shows_the_responses_that_depart_furthest_first(planted, departures, order):
    step = planted.read()
    concerned = [(1, 0), (1, 1), (1, 2)]
    step.advantages[1][:3] = [1.5, 0.5, -1.0]
    report = Report(
        2,
        [Comparison("sampling", "a", "departs", "", 0.5, 0.1, affected_responses=concerned)],
    )
    report.comparisons[0] = replace(report.comparisons[0], departures=departures)
    text = page.write_page(report, step).read_text()
    assert "that depart furthest" in text
    places = [text.index(f"group 1, response {response}") for response in order]
    assert places == sorted(places)


def test_a_step_that_has_no_log_is_refused(planted):
    planted.read()
    folder, config = open_run(planted.folder / "run")
    steps = examinable_steps(folder, config)
    assert [(each.step, each.has_before, each.has_after) for each in steps] == [(2, False, False)]
    with refused("--step", Cause.NOT_FOUND, 3):
        choose_step(steps, 3, folder.path)
    with refused("RUN", Cause.EMPTY):
        choose_step([], None, folder.path)
    for text in ("x", "0", "\uff12"):  # a digit two of full width
        with refused("--step", Cause.MALFORMED, text):
            run(Config(), str(folder.path), step=text)
    for text in ("x", "0", "-1", "nan", "inf"):
        with refused("--memory", Cause.MALFORMED, text):
            run(Config(), str(folder.path), memory=text)
    with refused("RUN", Cause.NOT_FOUND):
        run(Config(), str(planted.folder))


@pytest.mark.parametrize(
    ("algorithm", "std", "expected"),
    [
        # By hand: rewards 1, 0, 0, 1 have deviation 1/2.
        ("grpo", "group", [1.0, -1.0, -1.0, 1.0]),
        ("dr_grpo", "none", [0.5, -0.5, -0.5, 0.5]),
        ("reinforce", "none", [0.25, -0.75, -0.75, 0.25]),
    ],
)
def test_advantages_of_a_group_by_hand(algorithm, std, expected):
    groups = [[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]]
    made = formulas.recomputed_advantages(groups, ALGORITHMS[algorithm], std, 0.0)
    assert made[0] == pytest.approx(expected)
    rest = 0.25 if algorithm == "reinforce" else 0.0
    assert made[1] == pytest.approx([rest] * 4)


@pytest.mark.parametrize(
    "algorithm", [name for name, rules in ALGORITHMS.items() if rules.recomputed_baseline]
)
def test_advantages_are_those_of_the_algorithms_module(algorithm):
    rl, groups = RLConfig(algorithm=algorithm), [[1.0, 0.0, 0.0, 1.0], [0.5, 1.0, 0.25, 1.0]]
    made = formulas.recomputed_advantages(
        groups, ALGORITHMS[algorithm], rl.advantage_std, rl.advantage_epsilon
    )
    expected = algorithms.find_algorithm(algorithm).outcome_advantages(groups, rl)
    assert [*itertools.chain(*made)] == pytest.approx([*itertools.chain(*expected)])


def test_the_punishment_of_a_long_response_by_hand():
    # Over the last 20 of 100 tokens it grows from 0 to 1.
    made = [formulas.expected_training_reward(1.0, n, 100, 0.2, 1.0) for n in (80, 90, 100)]
    assert made == pytest.approx([1.0, 0.5, 0.0])


@pytest.mark.parametrize(("has_critic", "updates"), [(True, [0, 0, 2, 4]), (False, [0, 2, 4, 6])])
def test_an_own_algorithm_updates_the_policy_after_its_critics_warm_up(
    planted, monkeypatch, has_critic, updates
):
    rules = f"own_critic_{has_critic}"
    (planted.folder / f"{rules}.py").write_text(
        "from megatron_r1.config.algorithms import AlgorithmRules\n"
        f"RULES = AlgorithmRules(critic={has_critic})\n"
    )
    monkeypatch.syspath_prepend(planted.folder)
    planted.settings["rl"]["algorithm"] = f"{rules}:RULES"
    planted.settings["critic"] = {"warmup_steps": 1}
    step = planted.read()
    assert [step.updates_after(number) for number in range(4)] == updates


@pytest.mark.more
def test_an_audit_of_the_run_finds_a_wrong_grade(planted, capsys):
    second = planted.groups[1].responses
    terms = {"accuracy": 1.0, "format": 1.0}
    second[3] = replace(second[3], rewards=terms, reward=1.1)
    planted.read()
    audit_option.run(Config(), str(planted.folder / "run"))
    printed = capsys.readouterr().out
    assert "8 verdicts, 8 read a second time" in printed
    (line,) = (each for each in printed.splitlines() if each.startswith("  wrong"))
    assert "step 2, group 1" in line and "response 3" in line
    (signs,) = (each for each in printed.splitlines() if "signs" in each)
    assert "corrected in 2 of 2 groups" in signs and "50.0%" in signs


def test_advantages_of_rewards_that_are_normalized_alone_are_the_runs(planted):
    planted.settings["rl"] |= {"reward_normalization": "each", "overlong_buffer": 0.9}
    step = planted.read()
    expected = reward_normalization.advantages(
        step.groups, grpo.advantages, step.config, step.reward_weights
    )
    assert len({a for group in expected for a in group}) > 1
    for own, run_own in zip(step.advantages, expected, strict=True):
        assert own == pytest.approx(run_own, abs=1e-9)
