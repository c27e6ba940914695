"""Reruns of `why`: which side a departure is on, and what is said where none can be made."""

import math
from array import array
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from refusals import refused

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.commands import why
from megatron_r1.config import Config, ParallelConfig
from megatron_r1.trainer.training_sample import Sample
from megatron_r1.why.checks import engine_logprobs, reruns
from megatron_r1.why.checks.reruns import rerun_comparison
from megatron_r1.why.comparison import (
    DEPARTS,
    EQUAL,
    NOT_CHECKED,
    CannotRecompute,
    Comparison,
    not_checked,
)
from megatron_r1.why.policy import policy_writer
from megatron_r1.why.rerun import fresh_engine, single_rank
from megatron_r1.why.rerun.rerun_verdicts import (
    ENGINE_REMEDY,
    PUSH_REMEDY,
    Distances,
    NearestSide,
    absolute_distance,
    engine_verdict,
    nearest_side,
    rerun_hint,
    trainer_verdict,
)
from megatron_r1.why.step_report import Report

TOLERANCE = 1e-4
FAR, CLOSE, NAN = 0.1, 1e-6, math.nan
REPRODUCED, AGREES = Distances(FAR, CLOSE, FAR), Distances(FAR, FAR, CLOSE)
NEITHER, ALL_EQUAL = Distances(FAR, FAR, FAR), Distances(CLOSE, CLOSE, CLOSE)


@pytest.mark.parametrize(
    ("distances", "departs", "near", "words", "remedy"),
    [
        (REPRODUCED, True, NearestSide.RECORDED, "gives the logged values", ENGINE_REMEDY),
        (AGREES, True, NearestSide.TRANSFORMERS, "(the push)", PUSH_REMEDY),
        (NEITHER, True, NearestSide.NEITHER, "neither the logged values", ENGINE_REMEDY),
        (ALL_EQUAL, False, NearestSide.TRANSFORMERS, "as the run's did", ""),
        (
            Distances(CLOSE, FAR, FAR),
            False,
            NearestSide.NEITHER,
            "the run's did not",
            ENGINE_REMEDY,
        ),
        (Distances(FAR, NAN, CLOSE), True, NearestSide.TRANSFORMERS, "(the push)", PUSH_REMEDY),
        (Distances(FAR, NAN, FAR), True, NearestSide.NEITHER, "was not compared", ENGINE_REMEDY),
    ],
)
def test_a_fresh_engine_names_the_side(distances, departs, near, words, remedy):
    verdict = engine_verdict(distances, TOLERANCE, departs)
    assert (verdict.side, verdict.remedy) == (near, remedy)
    assert words in verdict.conclusion
    assert verdict.departs == (near is not NearestSide.TRANSFORMERS)


@pytest.mark.parametrize(
    ("distances", "departs", "layout", "near", "words"),
    [
        (
            AGREES,
            True,
            "parallel.tensor: 2",
            NearestSide.TRANSFORMERS,
            "the cause (parallel.tensor: 2)",
        ),
        (AGREES, True, "", NearestSide.TRANSFORMERS, "the run had one rank too"),
        (
            REPRODUCED,
            True,
            "parallel.tensor: 2",
            NearestSide.RECORDED,
            "the layout is not the cause",
        ),
        (NEITHER, True, "parallel.tensor: 2", NearestSide.NEITHER, "otherwise than the run's"),
        (
            ALL_EQUAL,
            False,
            "parallel.tensor: 2",
            NearestSide.TRANSFORMERS,
            "as the run's trainer did",
        ),
        (Distances(CLOSE, FAR, FAR), False, "", NearestSide.NEITHER, "did not"),
        (Distances(math.inf, math.inf, CLOSE), True, "", NearestSide.TRANSFORMERS, "one rank too"),
        (Distances(math.inf, 0.0, NAN), True, "", NearestSide.RECORDED, "is not the cause"),
    ],
)
def test_one_rank_names_the_side(distances, departs, layout, near, words):
    verdict = trainer_verdict(distances, TOLERANCE, departs, layout)
    assert verdict.side == near and words in verdict.conclusion
    assert verdict.departs == (near is not NearestSide.TRANSFORMERS)


@pytest.mark.parametrize(
    ("recorded", "reproduced", "rerun", "near"),
    [
        (TOLERANCE, CLOSE, TOLERANCE, NearestSide.TRANSFORMERS),
        (CLOSE, CLOSE, TOLERANCE * 1.01, NearestSide.RECORDED),
    ],
)
def test_without_a_departure_the_tolerance_decides(recorded, reproduced, rerun, near):
    assert nearest_side(Distances(recorded, reproduced, rerun), TOLERANCE, False) == near


@pytest.mark.parametrize("small", [TOLERANCE * 1.1, TOLERANCE / 8])
def test_a_departure_of_about_the_tolerance_is_told_apart(small):
    """All three distances are within it, or nearly: the nearer side counts."""
    near, far = 0.2 * small, 0.9 * small
    assert nearest_side(Distances(small, near, far), TOLERANCE, True) == NearestSide.RECORDED
    assert nearest_side(Distances(small, far, near), TOLERANCE, True) == NearestSide.TRANSFORMERS
    undecided = Distances(small, far, far)
    for verdict in (
        engine_verdict(undecided, TOLERANCE, True),
        trainer_verdict(undecided, TOLERANCE, True, "parallel.tensor: 2"),
    ):
        assert verdict.side == NearestSide.NEITHER and not verdict.departs
        assert "too small to tell" in verdict.conclusion


def test_numbers_that_are_not_finite_have_a_distance():
    assert absolute_distance(0.5, 0.25) == 0.25
    assert absolute_distance(NAN, 0.25) == absolute_distance(0.25, NAN) == math.inf
    assert absolute_distance(NAN, NAN) == 0.0


STEP = SimpleNamespace(step=3, folder=SimpleNamespace(path=Path("runs/a")))
LOGGED = Comparison(
    "sampling",
    "engines' log-probabilities",
    DEPARTS,
    "",
    FAR,
    TOLERANCE,
    reason="another function",
    remedy=ENGINE_REMEDY + rerun_hint(STEP, "engine"),
)
LATER = Comparison("sampling", "later", EQUAL, "")


def refined(monkeypatch, logged, check) -> Report:
    report = Report(3)
    report.add([logged, LATER])
    rerun = reruns.ENGINE._replace(check=check)
    monkeypatch.setitem(reruns.RERUNS, "engine", rerun)
    reruns.refine_by_reruns(report, STEP, None, ["engine"], lambda line: None)
    return report


def read_as(distances: Distances):
    verdict = engine_verdict(distances, TOLERANCE, True)
    return lambda *_: (
        rerun_comparison(reruns.ENGINE, "", distances, TOLERANCE, verdict),
        verdict,
    )


@pytest.mark.parametrize(
    ("distances", "status", "remedy"),
    [(REPRODUCED, DEPARTS, ENGINE_REMEDY), (AGREES, EQUAL, PUSH_REMEDY)],
)
def test_the_departure_gets_the_conclusion_and_its_remedy(monkeypatch, distances, status, remedy):
    report = refined(monkeypatch, LOGGED, read_as(distances))
    logged, fresh, later = report.comparisons
    assert report.first_departure is logged and later is LATER
    assert logged.reason.startswith("another function; a fresh engine ")
    assert logged.remedy == remedy  # without the command, which was just run
    assert (fresh.name, fresh.status) == ("a fresh engine's log-probabilities", status)


def test_a_cause_that_is_known_keeps_its_remedy(monkeypatch):
    known = replace(LOGGED, remedy="push.transport")
    logged, *_ = refined(monkeypatch, known, read_as(AGREES)).comparisons
    assert logged.remedy == "push.transport" and "(the push)" in logged.reason


@pytest.mark.parametrize(
    "error",
    [CannotRecompute("no room"), UserError("no room", key="rollout", cause=Cause.TOO_LARGE)],
)
def test_a_rerun_that_cannot_be_made_is_not_checked(monkeypatch, error):
    def fail(*_):
        raise error

    logged, fresh, _ = refined(monkeypatch, LOGGED, fail).comparisons
    assert logged == LOGGED
    assert (fresh.status, fresh.reason) == (NOT_CHECKED, "no room")


def test_nothing_is_started_for_what_was_not_compared(monkeypatch):
    logged = not_checked("sampling", LOGGED.name, "no checkpoint")
    fresh = refined(monkeypatch, logged, None).comparisons[1]
    assert fresh.status == NOT_CHECKED and "no checkpoint" in fresh.reason


@pytest.mark.parametrize("text", ["engines", "engine,", "engine;trainer", ""])
def test_other_reruns_are_refused_with_the_choices(tmp_path, text):
    with refused("--rerun", Cause.UNKNOWN, "one of engine, trainer"):
        why.run(Config(), str(tmp_path / "missing"), rerun=text)


def test_several_reruns_have_a_comma_between_them():
    assert why._parse_reruns("trainer, engine,trainer") == ["trainer", "engine"]
    assert why._parse_reruns(None) == []


@pytest.mark.parametrize(
    ("push", "hf_config", "words"),
    [
        ({"fp8": True}, {}, "push.fp8"),
        ({"adapter_only": True}, {}, "push.adapter_only"),
        ({}, {"quantization_config": {}}, "quantized"),
    ],
)
def test_engines_that_cannot_be_started_again_are_named(monkeypatch, push, hf_config, words):
    monkeypatch.setattr(fresh_engine, "find_spec", lambda name: name)
    config = Config().with_changes(push=push)
    with pytest.raises(CannotRecompute, match=words):
        fresh_engine.check_engine(
            SimpleNamespace(run_config=config, hf_config=hf_config), 1, 10**12
        )


@pytest.mark.parametrize("check", [fresh_engine.check_engine, single_rank.check_rank])
def test_a_model_larger_than_the_memory_is_not_started(monkeypatch, check):
    for module in (fresh_engine, single_rank):
        monkeypatch.setattr(module.gpu, "is_usable", lambda: False)
    monkeypatch.setattr(fresh_engine, "find_spec", lambda name: name)
    with pytest.raises(CannotRecompute, match="GB are free"):
        check(SimpleNamespace(run_config=Config(), hf_config={}), 10**15, 10**12)


def test_weights_that_do_not_fit_on_the_disk_are_not_written(tmp_path):
    with pytest.raises(CannotRecompute, match="set TMPDIR"):
        policy_writer.write_policy(STEP, 10**18, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_departure_without_a_cause_names_the_command_to_type_next():
    gaps = SimpleNamespace(
        untried_causes=[],
        step=SimpleNamespace(
            **vars(STEP),
            loss_fraction=lambda concerned: 1.0,
            run_config=SimpleNamespace(push=SimpleNamespace(fp8=False)),
        ),
        distance=FAR,
        tolerance=TOLERANCE,
        sequences=[SimpleNamespace(response=(0, 0))],
        gaps=[np.array([FAR])],
    )
    departure = engine_logprobs._departing_comparison(gaps, "", None)
    assert departure.remedy.endswith("; next: megatron-r1 why runs/a --step 3 --rerun engine")


def test_a_layout_is_what_one_rank_has_not():
    assert single_rank.layout_text(ParallelConfig(tokens_per_microbatch=64)) == ""
    layout = single_rank.layout_text(ParallelConfig(processes=4, tensor=2, share_prompts=True))
    assert layout == "parallel.processes: 4, parallel.tensor: 2"


def test_logprobs_of_a_prompt_are_those_of_the_sampled_tokens():
    is_sampled = np.array([False, False, True, True, False, True])
    sequence = SimpleNamespace(token_ids=np.arange(6), is_sampled=is_sampled)
    reply = array("f", [-1.0, -2.0, -3.0, -4.0])  # of tokens 1 to 4: the last did not fit
    assert fresh_engine._fitting_token_ids(sequence, 5) == [0, 1, 2, 3, 4]
    logprobs = fresh_engine._sampled_logprobs(sequence, reply)
    assert logprobs[:2].tolist() == [-2.0, -3.0] and np.isnan(logprobs[2])


def test_the_log_probabilities_of_a_branch_are_replaced_where_it_was_sampled():
    branch = Sample.pack_branch(
        array("i", range(6)),
        bytes([0, 0, 1, 0, 1, 0]),
        array("f", [0, 0, -1, 0, -1, 0]),
        1.0,
        weight=1.0,
        num_responses=1,
    )
    sample = single_rank._with_logprobs(branch, np.array([-0.25, -0.5]))
    assert np.frombuffer(sample.rollout_logprobs, np.float32).tolist() == [-0.25, 0.0, -0.5]
    with pytest.raises(ValueError, match="3 input values"):
        single_rank._with_logprobs(branch, np.zeros(3))


class Gaps(SimpleNamespace):
    def gaps_from(self, logprobs):
        return [logged - values for logged, values in zip(self.logged, logprobs, strict=True)]


def test_distances_are_of_the_responses_that_depart():
    """The second response departs; the last token is of an older version."""
    old = [np.array([-1.0, -1.0]), np.array([-2.0, -2.0])]
    gaps = Gaps(
        logged=[old[0], np.array([-2.5, NAN])],
        sequences=[SimpleNamespace(response=(0, 0)), SimpleNamespace(response=(0, 1))],
        policies=SimpleNamespace(old_logprobs=old),
        newest_version=2,
    )
    fresh = [old[0], np.array([-2.125, -9.0])]
    logged = replace(LOGGED, affected_responses=[(0, 1)])
    assert reruns._engine_distances(gaps, fresh, old, logged, True) == (0.5, 0.375, 0.125)
    partial = reruns._engine_distances(gaps, fresh, [old[0], fresh[1]], logged, False)
    assert (partial.recorded_to_transformers, partial.rerun_to_transformers) == (0.5, 0.0)
    assert math.isnan(partial.recorded_to_rerun)
    healthy = replace(LOGGED, status=EQUAL)
    assert reruns._engine_distances(gaps, old, old, healthy, True).rerun_to_transformers == 0.0
    with pytest.raises(CannotRecompute, match="version 2"):
        reruns._engine_distances(gaps, [np.full(2, NAN)] * 2, old, logged, True)
