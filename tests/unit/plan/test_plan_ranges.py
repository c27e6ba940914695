"""Ranges of estimated times, and what narrows them."""

import re
from dataclasses import replace

import pytest
from planned_jobs import RECIPE, ROOT, planned

from megatron_r1.commands.plan import main
from megatron_r1.config.hardware import Assumptions
from megatron_r1.plan.bill import Bill
from megatron_r1.plan.quantity import Quantity
from megatron_r1.plan.ranges import CLOSED_BY, MEASUREMENTS, narrowing_section
from megatron_r1.plan.timing import time_section


def times(job):
    return time_section(Bill(job).times)


def test_a_range_is_the_estimate_over_and_times_the_spread_and_at_most_a_factor_of_four():
    section = times(planned())
    for name in ("rollout", "scoring", "training", "push", "step", "run"):
        part = section[name]
        assert part.low == pytest.approx(part.number / 1.95), name
        assert part.high == pytest.approx(part.number * 1.95), name
        assert part.high / part.low <= 4
    assert section["bubble"].low is None
    with pytest.raises(ValueError, match="time_spread"):
        replace(Assumptions(), time_spread=2.01)


def test_what_is_measured_has_no_range_and_narrows_that_of_the_step():
    job = planned()
    measured = replace(job, measured={"decode_latency_per_layer": "measured.yaml"})
    section, known = times(job), times(measured)
    assert known["rollout"].low is None
    rest = section["step"].number - section["rollout"].number
    assert known["step"].low == pytest.approx(section["rollout"].number + rest / 1.95)
    assert known["step"].high == pytest.approx(section["rollout"].number + rest * 1.95)
    named = [set(narrowing_section(each, times(each))) for each in (job, measured)]
    assert named[0] - named[1] == {"rollout"}
    names = {name for names in CLOSED_BY.values() for name in names}
    everything = replace(job, measured=dict.fromkeys(names, "measured.yaml"))
    assert narrowing_section(everything, times(everything)) == {}
    assert times(everything)["step"].limits == ""


def test_with_rollouts_ahead_the_longer_side_decides_at_each_end():
    alone = {"rollout_gpus": 2048, "rollout__colocated": False, "rl__importance_cap": 2.0}
    job = replace(planned(**alone, rl__staleness=1), measured={"bandwidth_efficiency": "x"})
    section = times(job)
    stop = [section["push"], section["load"]]
    trainer = [section[name] for name in ("scoring", "training", "saves")]
    high = sum(p.high for p in stop) + max(
        section["rollout"].number, sum(part.high for part in trainer)
    )
    assert section["step"].high == pytest.approx(high)


@pytest.mark.parametrize(
    ("low", "high", "unit", "text"),
    [
        (140.2, 532.1, "hours", "140 to 532 hours"),
        (16.94, 2000, "s", "16.9 to 2,000 s"),
        (0.9, 1.5, "hours", "54 minutes to 1.5 hours"),
        (0.1, 0.4, "share", "10.0% to 40.0%"),
        (2.0, 2.0, "s", ""),
    ],
)
def test_a_range_is_written_with_its_unit_once_where_both_ends_have_the_same(low, high, unit, text):
    assert Quantity(1.0, unit, "", low, high).limits == text


def test_the_bill_names_the_measurement_of_each_wide_range(capsys):
    checklist = (ROOT / "docs/gpu-checklist.md").read_text()
    for check in MEASUREMENTS.values():
        assert f"`{check}`" in checklist, check
    assert main([str(RECIPE)]) == 0
    printed = capsys.readouterr().out
    narrowing = printed.partition("what would narrow the ranges")[2].partition("\n\n")[0]
    flat = " ".join(narrowing.split())
    for name, check in MEASUREMENTS.items():
        if name != "critic":
            assert re.search(rf"{name} 3.80 x tools/gpu_check, '{check}'", flat), name
    run = re.search(r"the run of 650 steps: (\d+ hours) \((\d+) to (\d+) hours\)", printed)
    assert run[0] in (ROOT / "docs/plan.md").read_text()
    readme = (RECIPE.parent / "README.md").read_text()
    assert f"| {run[1]} ({run[2]}–{run[3]});" in readme
    assert re.search(r"a step \([\d,]+ to [\d,]+ s\)", printed)


def test_a_response_that_may_outlast_its_time_limit_is_noted_where_its_range_does(capsys):
    longest = Bill(planned()).engines.longest_seconds
    high = longest * 1.95
    for limit, noted in ((high * 1.01, False), (high * 0.99, True)):
        notes = Bill(planned(rollout__request_timeout_seconds=limit)).notes()
        assert len(notes) == noted, limit
    assert "rollout.request_timeout_seconds" in notes[0] and "32,768 tokens" in notes[0]
    known = replace(planned(), measured={"bandwidth_efficiency": "measured.yaml"})
    config = known.config.with_changes(rollout={"request_timeout_seconds": longest * 1.01})
    assert Bill(replace(known, config=config)).notes() == []
    assert main([str(RECIPE)]) == 0  # 65,536 tokens, from step 513 on
    first, _, later = capsys.readouterr().out.partition("from step 513")
    assert "note:" not in first and "note: a response of 65,536 tokens" in later
