"""Ranges of estimated times, and what narrows them."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from planned_jobs import RECIPE, ROOT, planned

from megatron_r1.commands.plan import main
from megatron_r1.plan.assumptions import Assumptions
from megatron_r1.plan.estimate import JobEstimate
from megatron_r1.plan.job import Calibration
from megatron_r1.plan.job_options import parse_job_arguments
from megatron_r1.plan.offload import OFFLOAD
from megatron_r1.plan.quantity import Quantity
from megatron_r1.plan.recipe_job import planned_job
from megatron_r1.plan.sample_traffic import ROUTED_EXPERTS
from megatron_r1.plan.time_ranges import (
    MEASUREMENTS,
    PREFLIGHT_PARTS,
    narrowing_number,
    narrowing_section,
)
from megatron_r1.plan.timing import TIME_PARTS, time_section
from tools.gpu_check.checks import CHECKS

sys.path.append(str(ROOT / "tests" / "gpu"))
import gpu_miniatures


def times(job):
    return time_section(JobEstimate(job).times)


@pytest.mark.more
def test_a_range_is_the_estimate_over_and_times_the_spread_and_at_most_a_factor_of_four():
    section = times(planned())
    connections = JobEstimate(planned()).sections()["push"]
    estimated = [section[name] for name in ("rollout", ROUTED_EXPERTS, "training", "push")]
    for part in (*estimated, connections["set-up"], connections["push"]):
        assert part.low == pytest.approx(part.number / 1.96), part.formula
        assert part.high == pytest.approx(part.number * 1.96), part.formula
        assert part.high / part.low <= 4
    assert connections["into an engine GPU"].low is None, "bytes are exact"
    for end in ("low", "high"):
        total = sum(getattr(section[n], end) for n in TIME_PARTS if n in section)
        assert getattr(section["step"], end) == pytest.approx(total)
        assert getattr(section["run"], end) == pytest.approx(total * 650 / 3600)
    assert section["bubble"].low is None
    with pytest.raises(ValueError, match="time_spread"):
        replace(Assumptions(), time_spread=2.01)


DISTILL = ROOT / "examples/distill/qwen2.5-math-7b_on_policy.yaml"
JOBS = {
    "colocated": {"rollout__redundant_experts": 128},
    "pools": {"rollout_gpus": 2048, "rollout__colocated": False, "rl__staleness": 1}
    | {"rollout__redundant_experts": 128},
    "critic, disk": {"rl__algorithm": "ppo", "rl__advantage_std": "batch"}
    | {"parallel__offload_between_phases": "disk"},
    "teacher": None,
}


@pytest.mark.parametrize("name", JOBS)
def test_all_estimated_seconds_and_hours_have_a_range_of_at_most_four(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    changed = JOBS[name]
    job = (
        planned_job(DISTILL, *parse_job_arguments([str(DISTILL)]))
        if changed is None
        else planned(**changed)
    )
    sections = JobEstimate(job).sections()
    rows = [
        (title, row, part)
        for title, section in sections.items()
        for row, part in section.items()
        if title != "assumed" and part.unit in ("s", "hours") and part.value
    ]
    assert len(rows) > 5
    for title, row, part in rows:
        assert part.low and 1 < part.high / part.low <= 4, (title, row)
    # No seconds are hidden in the formula of a number of bytes.
    text = sections["push"]["into an engine GPU"].formula
    assert not re.search(r"\d s\b", text), text


def test_the_links_rates_close_the_ranges_of_communication():
    """NCCL's exchange of experts and hops between nodes by `network`; sums within one by `nvlink`.
    DeepEP's own rates are of other machines."""
    names = ("pipeline stalls", "allgather_reducescatter", "sums over tensor ranks")
    job = planned()
    sections = JobEstimate(job).sections()
    rows = sections["what would narrow the ranges"]
    numbers = [rows[name].formula.rpartition(": ")[2] for name in names]
    assert numbers == ["network", "network", "nvlink"]
    known = JobEstimate(calibrated(job, numbers)).sections()
    assert not set(names) & known["what would narrow the ranges"].keys()
    parts = known["expert exchange of a layer"] | known["time"]
    assert [parts[name].low for name in names] == [None] * 3
    assert parts["deepep_low_latency"].low is not None
    few = JobEstimate(calibrated(job, numbers, num_gpus=16)).sections()
    assert set(names) <= few["what would narrow the ranges"].keys()


def test_tokens_per_second_have_the_range_of_the_step():
    section = times(planned())
    rate, step = section["tokens per second"], section["step"]
    assert rate.low * step.high == rate.high * step.low == pytest.approx(rate.number * step.number)


def test_what_no_check_measures_is_named_with_what_would():
    estimate = JobEstimate(planned())
    rows = estimate.sections()["what would narrow the ranges"]
    assert rows["set-up"].number == pytest.approx(1.96**2)
    assert re.search("no check measures it.*NCCL's 'Init timings'", rows["set-up"].formula)
    # With one draft a pass gives 1 to 2 tokens.
    assert rows["drafts"].number == 2
    assert "--calibrate-from" in rows["drafts"].formula
    assert rows["drafts"].formula.endswith("no check measures it: draft_acceptance")
    without = JobEstimate(planned(rollout__speculative__method="none")).sections()
    assert "drafts" not in without["what would narrow the ranges"]


def calibrated(job, names, num_gpus=None):
    """The job with numbers measured on as many GPUs, by default its own."""
    calibration = Calibration(Path("measured.yaml"), frozenset(names), num_gpus or job.num_gpus)
    return replace(job, calibration=calibration)


def test_what_is_measured_has_no_range_and_narrows_that_of_the_step():
    job = planned()
    measured = calibrated(job, {"decode_latency_per_layer"})
    section, known = times(job), times(measured)
    assert known["rollout"].low is None
    exact = section["rollout"].number
    rest = section["step"].number - exact
    assert known["step"].low == pytest.approx(exact + rest / 1.96)
    assert known["step"].high == pytest.approx(exact + rest * 1.96)
    named = [set(narrowing_section(each, times(each))) for each in (job, measured)]
    assert named[0] - named[1] == {"rollout"}
    names = {narrowing_number(job, name) for name in (*MEASUREMENTS, *PREFLIGHT_PARTS)}
    everything = calibrated(job, names | {"draft_acceptance"})
    assert narrowing_section(everything, times(everything)) == {}
    assert times(everything)["step"].limits == ""


def test_what_one_gpu_measured_leaves_the_range_of_communication():
    job = planned()
    names = {narrowing_number(job, name) for name in (*MEASUREMENTS, ROUTED_EXPERTS)}
    measured = calibrated(job, names, num_gpus=1)
    estimate = JobEstimate(measured).times
    section = times(measured)
    rank = estimate.busiest_rank
    communication = estimate.exposed_communication_seconds(rank, True)
    communication += estimate.pipeline_stall_seconds(True)
    shares = {
        "training": communication / estimate.microbatch_seconds(rank, True),
        "rollout": estimate.rollout.exchange_seconds(estimate.engines.mean_concurrency)
        / estimate.rollout.step_seconds(estimate.engines.mean_concurrency)
        / estimate.rollout.tokens_per_pass,
        "push": 1.0,  # over NCCL, between nodes
    }
    for name, share in shares.items():
        part = section[name]
        assert 0 < share <= 1, name
        assert part.low == pytest.approx(part.number * (1 - share + share / 1.96)), name
        assert part.high == pytest.approx(part.number * (1 - share + share * 1.96)), name
    assert section["load"].low is None
    named = narrowing_section(measured, section)
    assert "--calibrate-from" in named["push"].formula
    assert not any("gpu_check" in quantity.formula for quantity in named.values())


def test_with_rollouts_ahead_each_end_is_that_of_the_longest_of_three():
    alone = {"rollout_gpus": 2048, "rollout__colocated": False, "rl__importance_cap": 2.0}
    job = calibrated(planned(**alone, rl__staleness=1), {"decode_latency_per_layer"})
    section = times(job)
    stop = [section["push"], section["load"]]
    trainer = [section[name] for name in ("logprobs", "training", "saves")]
    trained = sum(part.high for part in (*trainer, section[ROUTED_EXPERTS]))
    either = (section["rollout"].number + trained) / 2
    assert either > trained
    assert section["step"].high == pytest.approx(sum(p.high for p in stop) + either)


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
    checklist = " ".join((ROOT / "docs/gpu-checklist.md").read_text().split())
    for check in MEASUREMENTS.values():
        assert f"`{check}`" in checklist, check
    assert main([str(RECIPE)]) == 0
    printed = capsys.readouterr().out
    narrowing = printed.partition("what would narrow the ranges")[2].partition("\n\n")[0]
    flat = " ".join(narrowing.split())
    for name, check in MEASUREMENTS.items():
        if name not in ("critic", OFFLOAD):
            command = f"tools/gpu_check --only '{check}', then --calibrate"
            assert re.search(rf"{name} 3.84 x {command}", flat), name
    preflight = "the preflight with --preflight.calibration FILE, then --calibrate FILE"
    assert f"{ROUTED_EXPERTS} 3.84 x {preflight}: host_network" in flat
    run = re.search(r"the run of 650 steps: (\d+ hours) \((\d+) to (\d+) hours\)", printed)
    assert run[0] in (ROOT / "docs/plan.md").read_text()
    readme = (RECIPE.parent / "README.md").read_text()
    assert f"| {run[1]} ({run[2]}–{run[3]});" in readme
    assert re.search(r"a step \([\d,]+ to [\d,]+ s\)", printed)


DEEPEP = [
    "--rollout.vllm",
    "{all2all_backend: deepep_low_latency, max_num_batched_tokens: 128}",
]


@pytest.mark.more
@pytest.mark.parametrize(
    ("recipe", "options", "cell"),
    [
        ("r1_zero", [], "| {0} hours ({1}–{2});"),
        ("r1_zero", DEEPEP, "with DeepEP {0} ({1}–{2}) |"),
        ("r1_zero_pools", [], "| {0} hours ({1}–{2}) |"),
        ("r1_zero_fp8", [], "| {0} hours ({1}–{2}) |"),
    ],
)
def test_the_recipes_page_has_the_plan_s_hours(capsys, recipe, options, cell):
    assert main([str(RECIPE.with_stem(recipe)), *options]) == 0
    printed = capsys.readouterr().out
    run = re.search(r"the run of 650 steps: (\d+) hours \((\d+) to (\d+) hours\)", printed)
    page = (RECIPE.parent / "README.md").read_text()
    (row,) = (line for line in page.splitlines() if line.startswith(f"| `{recipe}` |"))
    assert cell.format(*run.groups()) in row


def test_the_plan_names_checks_that_exist():
    assert set(MEASUREMENTS.values()) <= {check.name for check in CHECKS}


def test_engines_of_one_gpu_need_the_bandwidth_and_saves_that_block_the_storage():
    small = replace(
        planned(rollout__engines=2048, rollout__tensor_parallel=1, rollout__data_parallel=1)
    )
    assert [narrowing_number(job, "rollout") for job in (planned(), small)] == [
        "decode_latency_per_layer",
        "bandwidth_efficiency",
    ]
    blocking = planned(checkpoint__asynchronous=False)
    assert [narrowing_number(job, "saves") for job in (planned(), blocking)] == [
        "host_link",
        "storage",
    ]


@pytest.mark.more
def test_a_plan_with_the_checks_file_has_a_narrower_range(tmp_path, monkeypatch, capsys):
    """The file that all three checks of seconds have written, as they write it."""
    monkeypatch.setattr(gpu_miniatures, "device_kind", lambda: "gpu")
    folder, file = tmp_path / "check" / "run", tmp_path / "calibration.yaml"
    for values in (
        {"decode_latency_per_layer": 1e-4, "bandwidth_efficiency": 0.6},
        {"compute_efficiency": 0.4},
        {"wake_seconds": 1.5, "tensor_load_seconds": 2e-4},
    ):
        assert gpu_miniatures.write_calibration(folder, "H800", values)["written"] == str(file)
    whole = tmp_path / "whole.yaml"
    whole.write_text(f"{file.read_text()}gpus: {planned().num_gpus}\npush_efficiency: 0.5\n")
    assert main([str(RECIPE)]) == main([str(RECIPE), "--calibrate", str(file)]) == 0
    assert main([str(RECIPE), "--calibrate", str(whole)]) == 0
    ranges = re.findall(
        r"run of 650 steps: \d+ hours \((\d+) to (\d+) hours\)", capsys.readouterr().out
    )
    wide, of_one_gpu, narrow = (int(high) / int(low) for low, high in ranges)
    assert wide > 3.5 > 2.5 > of_one_gpu > 1.1 > narrow
    gpu_miniatures.write_calibration(folder, "H100", {"compute_efficiency": 0.4})
    assert main([str(RECIPE), "--calibrate", str(file)]) == 2
    assert "H100" in capsys.readouterr().err


@pytest.mark.more
def test_a_response_that_may_outlast_its_time_limit_is_noted_where_its_range_does(capsys):
    longest = JobEstimate(planned()).times.rollout.longest_seconds
    high = longest * 1.96
    for limit, noted in ((high * 1.01, False), (high * 0.99, True)):
        notes = JobEstimate(planned(rollout__request_timeout_seconds=limit)).notes()
        assert len(notes) == noted, limit
    assert "rollout.request_timeout_seconds" in notes[0] and "32,768 tokens" in notes[0]
    known = calibrated(planned(), {"decode_latency_per_layer"})
    config = known.config.with_changes(rollout={"request_timeout_seconds": longest * 1.01})
    assert JobEstimate(replace(known, config=config)).notes() == []
    # 65,536 tokens, from step 513 on; the recipe's limit is above their range.
    assert main([str(RECIPE)]) == 0 and "note:" not in capsys.readouterr().out
    assert main([str(RECIPE), "--rollout.request_timeout_seconds", "3600"]) == 0
    first, _, later = capsys.readouterr().out.partition("from step 513")
    assert "note:" not in first and "note: a response of 65,536 tokens" in later
