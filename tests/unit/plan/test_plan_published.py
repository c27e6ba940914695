"""megatron-r1 plan --published: predictions next to published figures."""

import re
from pathlib import Path

import pytest

from megatron_r1.commands.plan import main
from megatron_r1.plan.arguments import config_of, job_of, parse
from megatron_r1.plan.bill import Bill
from megatron_r1.plan.measured import published_figures, run_hours
from megatron_r1.plan.timing import time_section

ROOT = Path(__file__).parents[3]
RECIPE = ROOT / "examples/deepseek_r1/r1_zero.yaml"


def test_the_printed_table_has_the_published_values_and_their_ratios(capsys):
    assert main(["--published"]) == 0
    output = capsys.readouterr().out
    table = re.findall(
        r"^\| (\d)\..* \| ([\d,.]+) [sh] \| ([\d,.]+) [sh] \| ([\d.]+) \|$", output, re.M
    )
    assert len(table) == len(published_figures()) >= 5
    for number, predicted, published, ratio in table:
        row = published_figures()[int(number) - 1]
        assert float(published.replace(",", "")) == row.published
        value = float(predicted.replace(",", "")) / row.published
        assert float(ratio) == pytest.approx(value, abs=0.011)


def test_outside_a_checkout_it_says_where_to_start(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["--published"]) == 2
    said = "".join(capsys.readouterr())
    assert "examples/deepseek_r1/r1_zero.yaml" in said and "in a checkout" in said


def test_a_run_s_hours_are_its_phases():
    chosen, overrides = parse([str(RECIPE)])
    assert [step for step, _ in config_of(RECIPE, overrides).phases()] == [1, 513]
    first, second = (Bill(job_of(RECIPE, chosen, overrides, n)).step.number for n in (512, 650))
    hours = (512 * first + 138 * second) / 3600
    assert run_hours(RECIPE, chosen, overrides) == pytest.approx(hours)


def test_rollouts_ahead_of_the_trainer_take_the_longer_side_s_time():
    alone = ["--rollout-gpus", "2048", "--rollout.colocated", "false", "--rl.importance_cap", "2"]
    times = []
    for staleness in ("0", "1"):
        chosen, overrides = parse([str(RECIPE), *alone, "--rl.staleness", staleness])
        section = time_section(Bill(job_of(RECIPE, chosen, overrides)).times)
        times.append({name: quantity.value for name, quantity in section.items()})
    assert times[0]["rollout"] > times[0]["scoring"] + times[0]["training"]
    assert times[1]["step"] == pytest.approx(times[0]["rollout"] + times[0]["push"])
    names = ("rollout", "routed experts", "scoring", "training", "push")
    parts = sum(times[0][name] for name in names)
    assert times[0]["step"] == pytest.approx(parts)
