"""tools/bench chaos: its oracle finds each violation, and every fault gets its turn."""

import json
import random
from pathlib import Path

import pytest

from tests.chaos import oracle
from tests.chaos.disturbed_run import order
from tests.chaos.user import End, Sighting, User


def line(step: int, **wrong) -> dict:
    right = {
        "step": step,
        "optimizer_step": oracle.MINIBATCHES * step,
        "policy_version": step - 1,
        "staleness": 0.0,
        "logprob_diff/max": 1e-6,
        "loss": 0.25 * step,
        "time/step": 1.0,
        "groups/restored": 0,
    }
    return right | wrong


def written(folder: Path, lines: list[dict]) -> Path:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    return folder


def test_a_run_with_every_step_once_is_right(tmp_path):
    assert list(oracle.steps_once(written(tmp_path, [line(1), line(2), line(3)]), 3)) == []


def test_samples_may_be_as_old_as_the_recipe_lets_them(tmp_path):
    stale = line(2, staleness=0.7, **{"logprob_diff/max": 0.1})
    run = written(tmp_path, [line(1), stale, line(3, staleness=1.2)])
    (wrong,) = oracle.steps_once(run, 3, staleness=1)
    assert wrong.startswith("step 3: its samples are of another policy")


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ([line(1), line(3)], "missing [2]"),
        ([line(1), line(2), line(2), line(3)], "twice [2]"),
        ([line(2), line(1), line(3)], "in order: False"),
        ([line(1), line(2, optimizer_step=3), line(3)], "step 2: after 3 updates"),
        ([line(1), line(2, staleness=0.5), line(3)], "step 2: its samples are of another policy"),
        ([line(1), line(2), line(3, **{"logprob_diff/max": 0.1})], "step 3: trainer and engine"),
        ([line(1), line(2), line(3, **{"logprob_diff/max": float("nan")})], "step 3: trainer and"),
    ],
)
def test_what_is_wrong_with_the_metrics_is_found(tmp_path, lines, found):
    wrong = list(oracle.steps_once(written(tmp_path, lines), 3))
    assert any(found in one for one in wrong), wrong


def user_who_saw(sightings: list[Sighting], kept: dict[int, int], tmp_path: Path) -> User:
    user = User([], tmp_path / "run", tmp_path / "commands")
    user.sightings = sightings
    user.ends = [End(1.0, -9, "", kept)]
    return user


@pytest.mark.parametrize(
    ("again", "found"),
    [
        (line(2, **{"groups/restored": 8, "time/step": 9.0}), []),
        (line(2, **{"groups/restored": 7}), ["step 2, done again: 1 groups were sampled again"]),
        (line(2, **{"groups/restored": 8, "loss": 0.51}), ["step 2, done again, differs in loss"]),
    ],
)
def test_a_step_that_is_done_again_is_the_step_it_was(tmp_path, again, found):
    seen = [Sighting(line(1), 1.0, 0), Sighting(line(2), 2.0, 0), Sighting(again, 9.0, 1)]
    assert list(oracle.nothing_lost(user_who_saw(seen, {}, tmp_path))) == found


def test_groups_that_were_finished_when_the_command_ended_are_used_by_the_next(tmp_path):
    used, lost = line(2, **{"groups/restored": 3}), line(2, **{"groups/restored": 2})
    for then, found in (used, []), (lost, ["step 2: 3 groups were finished, 2 of them were used"]):
        seen = [Sighting(line(1), 1.0, 0), Sighting(then, 9.0, 1)]
        assert list(oracle.nothing_lost(user_who_saw(seen, {2: 3}, tmp_path))) == found


def test_every_kind_of_fault_comes_before_any_comes_again():
    faults = order(["a", "b", "c"], random.Random(0))
    for _ in range(5):
        assert sorted(next(faults) for _ in range(3)) == ["a", "b", "c"]


def test_accuracy_may_differ_by_the_noise_of_two_evaluations_and_not_by_more(tmp_path):
    def ended_at(name: str, accuracy: float) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        interval = {
            "interval/pass@1/low": accuracy - 0.098,
            "interval/pass@1/high": accuracy + 0.098,
        }
        text = json.dumps({"step": 9, "eval/pass@1": accuracy, **interval})
        (folder / "evaluations.jsonl").write_text(text + "\n")
        return folder

    peace = [ended_at("peace", 0.8)]
    mean, allowed = oracle.allowed_gap(peace)
    assert mean == 0.8 and allowed == pytest.approx(0.098 * 2**0.5)  # 1.96 x 0.05 x sqrt(2)
    assert list(oracle.as_accurate(ended_at("near", 0.67), peace)) == []
    (wrong,) = oracle.as_accurate(ended_at("far", 0.6), peace)
    assert wrong.startswith("accuracy 0.600; undisturbed 0.800")
