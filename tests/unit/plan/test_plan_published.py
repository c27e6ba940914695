"""megatron-r1 plan --published: what published runs calibrate, and how far the plan is off."""

import math
import re
from pathlib import Path

import pytest
import yaml

from megatron_r1.commands.plan import main
from megatron_r1.plan.assumptions import Assumptions
from megatron_r1.plan.engine_memory import EngineMemory
from megatron_r1.plan.estimate import JobEstimate
from megatron_r1.plan.hardware import GIB, HARDWARE
from megatron_r1.plan.job_options import parse_job_arguments
from megatron_r1.plan.published_runs import PublishedRun, published_runs
from megatron_r1.plan.published_table import is_in_range
from megatron_r1.plan.recipe_job import load_planned_recipe, planned_job
from megatron_r1.plan.timing import time_section

ROOT = Path(__file__).parents[3]
RECIPE = ROOT / "examples/deepseek_r1/r1_zero.yaml"


DATA = yaml.safe_load((ROOT / "megatron_r1/plan/published.yaml").read_text())


@pytest.fixture(scope="module")
def runs():
    return published_runs()


def test_every_other_row_of_each_source_calibrates(runs):
    for source in DATA["sources"]:
        own = [run for run in runs if run.system == source["name"]]
        assert [run.published_value for run in own] == [row["published"] for row in source["rows"]]
        assert [run.is_for_calibration for run in own] == [n % 2 == 0 for n in range(len(own))]
    calibrating = sum(run.is_for_calibration for run in runs)
    assert 0 <= 2 * calibrating - len(runs) <= len(DATA["sources"])


def test_the_plan_s_numbers_are_those_of_least_error_on_the_calibrating_half(runs):
    """A change of any of them by a tenth costs more: squares of the logarithms of predicted over
    published, and a quarter of those of value over first guess."""
    half = [run for run in runs if run.is_for_calibration]
    guesses = {"compute_efficiency": 0.45, "link_efficiency": 0.75, "bandwidth_efficiency": 0.6}
    guesses["decode_latency_per_layer"] = 150e-6
    found = {name: getattr(Assumptions(), name) for name in guesses}

    def cost(**changed: float) -> float:
        values = found | changed
        guessed = sum(math.log(values[name] / guesses[name]) ** 2 for name in guesses)
        return sum(math.log(run.ratio(**values)) ** 2 for run in half) + guessed / 4

    least = cost()
    for name, value in found.items():
        for factor in (1.1, 1 / 1.1):
            assert cost(**{name: value * factor}) > least, (name, factor)


def test_published_trainers_of_plain_megatron_wait_in_every_hop(runs):
    """NeMo-RL and verl train with Megatron-Core as it is, DeepSeek with a system of its own."""
    systems = {run.system for run in runs if run.schedule_parts[0].job.plain_megatron}
    assert systems == {"NeMo-RL", "verl"}
    run = next(run for run in runs if run.name == "DeepSeek-V3, 256 H100")
    times = run.schedule_parts[0].times({})
    pipeline = times.traffic_by_axis(0)["pipeline"]
    transfer = pipeline.seconds(times.job, pipeline.forward_bytes)
    assert times.hop_seconds == pytest.approx(transfer + 200e-6)


def test_every_published_run_lies_in_its_range(runs):
    for run in runs:
        section = time_section(run.schedule_parts[0].times({}))
        if run.number in section:
            part = section[run.number]
            inside = part.low <= run.published_value <= part.high
            assert part.high / part.low <= 4
        else:  # hours of all parts, and the MFU, whose inverse is a time
            inside = 1 / 1.96 <= run.predict() / run.published_value <= 1.96
        assert inside and is_in_range(run.ratio()), run.name


def test_engines_have_a_gpu_s_memory_besides_the_plan_s_receive_buffer(runs):
    """The systems compared load weights piece by piece: each has what its own GPU has."""
    for run in runs:
        job = run.schedule_parts[0].job
        if job.rollout_gpus:
            spare = job.hardware.memory - EngineMemory(job, 0).receive_buffer_bytes
            assert 0 <= spare - HARDWARE[job.hardware.name].memory <= 1.5 * GIB, run.name


def test_the_spread_is_that_of_the_calibrating_half(runs):
    """1.645 standard deviations, which hold the middle 90% of a normal distribution."""
    logs = [math.log(run.ratio()) for run in runs if run.is_for_calibration]
    deviation = math.sqrt(sum(log * log for log in logs) / (len(logs) - 4))
    assert Assumptions().time_spread == pytest.approx(math.exp(1.645 * deviation), abs=0.02)


@pytest.mark.more
def test_the_printed_errors_are_those_of_the_data_file(capsys):
    """By hand from the printed predictions: each run's ratio, and each source's mean factor."""
    assert main(["--published"]) == 0
    output = capsys.readouterr().out
    rows = re.findall(
        r"^\| (\d+)\. ([^:]+): (.*) \| (\S+ ?\S*) \| ([\d,.]+)\S* ?\S* \| .* \| "
        r"([\d,.]+)\S* ?\S* \| ([\d.]+) \|$",
        output,
        re.M,
    )
    data = [(s["name"], row) for s in DATA["sources"] for row in s["rows"]]
    assert len(rows) == len(data)
    ratios: dict[tuple[str, str], list[float]] = {}
    printed = zip(rows, data, strict=True)
    for (_, system, name, half, predicted, published, ratio), (source, row) in printed:
        assert (system, name) == (source, row["name"])
        published = float(published.replace(",", ""))
        value = float(predicted.replace(",", "")) / published
        if row.get("number") == "MFU":
            value = 1 / value
        assert published == pytest.approx(
            row["published"] * (100 if "MFU" in name else 1), rel=5e-3
        )
        assert float(ratio) == pytest.approx(value, rel=0.02), name
        for group in (system, "all"):
            ratios.setdefault((group, half), []).append(value)
    cells = r"(\d+): ([\d.]+) x[^|]*"
    errors = re.findall(rf"^\| (\S+) \| {cells}\| {cells}\|", output, re.M)
    assert [error[0] for error in errors] == [*(s["name"] for s in DATA["sources"]), "all"]
    for system, *cells in errors:
        for half, count, factor in zip(
            ("calibrated", "held out"), cells[::2], cells[1::2], strict=True
        ):
            own = ratios[system, half]
            mean = math.exp(sum(abs(math.log(value)) for value in own) / len(own))
            assert int(count) == len(own)
            assert float(factor) == pytest.approx(mean, rel=0.02), (system, half)
    assert "\noutside its range: none\n" in output


def test_outside_a_checkout_it_says_where_to_start(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["--published"]) == 2
    said = "".join(capsys.readouterr())
    assert "examples/deepseek_r1/r1_zero.yaml" in said and "in a checkout" in said


def test_a_run_s_hours_are_its_phases():
    chosen, overrides = parse_job_arguments([str(RECIPE)])
    assert [step for step, _ in load_planned_recipe(RECIPE, overrides).schedule_parts()] == [1, 513]
    first, second = (
        JobEstimate(planned_job(RECIPE, chosen, overrides, n)).step.number for n in (512, 650)
    )
    hours = (512 * first + 138 * second) / 3600
    run = PublishedRun("r1-zero", "paper", True, str(RECIPE), "run", hours)
    assert run.predict() == pytest.approx(hours)


def in_pools(*options):
    """Return the estimate of the recipe with engines on GPUs of their own, and its times."""
    alone = ["--rollout-gpus", "2048", "--rollout.colocated", "false", "--rl.importance_cap", "2"]
    alone += ["--rollout.redundant_experts", "0"]
    chosen, overrides = parse_job_arguments([str(RECIPE), *alone, *options])
    estimate = JobEstimate(planned_job(RECIPE, chosen, overrides))
    return estimate, {name: part.value for name, part in time_section(estimate.times).items()}


SHORT = ("--rollout.max_response_tokens", "2048")


def trainer_seconds(times):
    return sum(times[name] for name in ("routed experts", "logprobs", "training", "saves"))


@pytest.mark.parametrize(
    ("options", "decides"),
    [
        (["--rl.staleness", "1"], "rollout"),
        (["--rl.staleness", "3"], "rollout"),
        (["--rl.staleness", "1", "--rollout-gpus", "256", "--rollout.engines", "2"], "tokens"),
        (["--rl.staleness", "1", "--gpus", "256", *SHORT], "trainer"),
    ],
)
def test_steps_with_rollouts_ahead_take_as_long_as_the_sampler_s_rule_makes_them(options, decides):
    """Event by event: the rollout of step s begins at the push of version s - 1 - staleness.

    The step trains when its rollout, the step before and the engines' other tokens are done."""
    estimate, times = in_pools(*options)
    rollout = times["rollout"]
    trains = trainer_seconds(times)
    full = estimate.times.rollout.throughput_seconds
    stopped = times["push"] + times["load"]
    ahead = estimate.job.config.rl.staleness
    ends, free = [0.0] * (ahead + 1), 0.0
    while len(ends) < 200:
        begin = ends[-1 - ahead]
        free = max(free, begin) + full
        ends.append(max(ends[-1], begin + rollout, free) + trains)
    step = (ends[-1] - ends[-101]) / 100
    assert times["step"] == pytest.approx(step + stopped)
    longest = {"trainer": trains, "tokens": full, "rollout": (rollout + trains) / (1 + ahead)}
    assert max(longest, key=longest.get) == decides


def test_without_rollouts_ahead_the_parts_of_a_step_follow_each_other():
    _, times = in_pools("--rl.staleness", "0")
    parts = times["rollout"] + trainer_seconds(times) + times["push"] + times["load"]
    assert times["step"] == pytest.approx(parts)
