"""megatron-r1 plan --calibrate and --calibrate-from: measured values in place of assumed ones."""

import json
from pathlib import Path

import pytest
import yaml
from planned_jobs import V3
from refusals import refused

from megatron_r1.base.errors import Cause
from megatron_r1.commands.plan import main
from megatron_r1.plan.assumptions import Assumptions
from megatron_r1.plan.calibration import calibrate_from
from megatron_r1.plan.calibration_file import apply_calibration
from megatron_r1.plan.hardware import HARDWARE, described_fields
from megatron_r1.plan.job_options import parse_job_arguments

ROOT = Path(__file__).parents[3]
LAPTOP = ROOT / "examples/laptop/r1_zero.yaml"
MODEL = ["--model.path", str(ROOT / "examples/laptop/model")]


def estimate(tmp_path: Path, *options: str) -> dict:
    """Plan the laptop's recipe; return {(section, name): value}."""
    file = tmp_path / "plan.json"
    main([str(LAPTOP), *MODEL, "--json", str(file), *options])
    sections = json.loads(file.read_text())["sections"]
    return {(title, name): q["value"] for title, s in sections.items() for name, q in s.items()}


def test_every_number_says_where_it_is_from():
    for part in (HARDWARE["H800"], Assumptions()):
        for name, info in described_fields(part).items():
            assert info.description and len(info.description) > 10, name


def test_a_measured_value_changes_itself_and_what_follows_from_it(tmp_path, capsys):
    file = tmp_path / "measured.json"
    file.write_text(json.dumps({"push_efficiency": 1e-06, "nvlink": 1e11}))
    before, after = estimate(tmp_path), estimate(tmp_path, "--calibrate", str(file))
    # What is measured has no range, so nothing that would narrow it.
    gone = ("what would narrow the ranges", "push")
    assert before.keys() - after.keys() == {gone}
    changed = {key for key in after if before[key] != after[key]}
    steps = ("push", "step", "share of rollout", "tokens per second", "run")
    assert changed == {("time", name) for name in steps} | {
        ("assumed", "push_efficiency"),
        ("assumed", "nvlink"),
    }
    push = ("time", "push")
    assert after[push] == pytest.approx(before[push] * 0.75 / 1e-6)
    difference = after["time", "step"] - before["time", "step"]
    assert difference == pytest.approx(after[push] - before[push])
    output = capsys.readouterr().out
    assert f"measured:{file}" in "".join(output.split())


@pytest.mark.parametrize(
    ("text", "cause", "shows"),
    [
        ("compute_eficiency: 0.3", Cause.UNKNOWN, ["compute_eficiency", "compute_efficiency"]),
        ("efficiency_of_all: 0.3", Cause.UNKNOWN, ["efficiency_of_all"]),
        ("compute_efficiency: fast", Cause.MALFORMED, ["compute_efficiency", "'fast'"]),
        ("compute_efficiency: true", Cause.MALFORMED, ["compute_efficiency", "True"]),
        ("compute_efficiency: [0.3]", Cause.MALFORMED, ["compute_efficiency", "[0.3]"]),
        ("compute_efficiency: 0", Cause.MALFORMED, ["compute_efficiency: 0"]),
        ("compute_efficiency: 1.5", Cause.MALFORMED, ["compute_efficiency: 1.5"]),
        ("reserved: -1.0", Cause.MALFORMED, ["reserved: -1.0"]),
        ("network: .inf", Cause.MALFORMED, ["network: inf"]),
        ("prompt_tokens: 20.5", Cause.MALFORMED, ["prompt_tokens: 20.5"]),
        ("hardware: H100", Cause.CONFLICT, ["H100", "H800"]),
        ("gpus: many", Cause.MALFORMED, ["gpus", "'many'"]),
        ("gpus: 0", Cause.MALFORMED, ["gpus: 0"]),
    ],
)
def test_a_mistake_in_the_file_is_named(tmp_path, text, cause, shows):
    file = tmp_path / "measured.yaml"
    file.write_text(text)
    with refused("--calibrate", cause, file, *shows):
        apply_calibration(HARDWARE["H800"], Assumptions(), file)


@pytest.mark.parametrize("text", ["- 0.3", None])
def test_a_file_that_cannot_be_read_is_named(tmp_path, capsys, text):
    file = tmp_path / "measured.yaml"
    if text:
        file.write_text(text)
    assert main([str(LAPTOP), *MODEL, "--calibrate", str(file)]) == 2
    assert str(file) in capsys.readouterr().err


def a_run(folder: Path, tmp_path: Path, truth: dict, gpus: str) -> None:
    """Write the folder of a run whose seconds are the plan's with the values of `truth`."""
    folder.mkdir()
    recipe = yaml.safe_load(LAPTOP.read_text())
    recipe["rollout"] |= {"max_response_tokens": 100}
    recipe["rl"] |= {"group_size": 16}
    recipe["parallel"] = {"tokens_per_microbatch": 8192}
    (folder / "config.yaml").write_text(yaml.safe_dump(recipe))
    values = tmp_path / "truth.yaml"
    values.write_text(yaml.safe_dump(truth))
    plan = tmp_path / "truth.json"
    options = ["--response-tokens", "60", "--prompt-tokens", "20", "--gpus", gpus]
    options += ["--calibrate", str(values), "--json", str(plan)]
    assert main([str(folder / "config.yaml"), *MODEL, *options]) == 0
    time = json.loads(plan.read_text())["sections"]["time"]
    seconds = {name: quantity["value"] for name, quantity in time.items()}
    rl, parallel = recipe["rl"], recipe["parallel"]
    # All samples of an optimizer step, 80 tokens each, in one micro-batch of each rank.
    samples = rl["prompts_per_rollout"] * rl["group_size"] / rl["minibatches"]
    step = {
        "response_length/mean": 60.0,
        "response_length/max": 100,
        "packing/microbatches": 1.0,
        "packing/fill": samples * 80 / int(gpus) / parallel["tokens_per_microbatch"],
        "time/rollout": seconds["rollout"],
        "time/train": seconds["logprobs"] + seconds["training"],
        "time/push": seconds["push"],
    }
    warmup = {key: value * 3 for key, value in step.items()}
    lines = [warmup, step, step | {"time/push": step["time/push"] * 9}, step]
    records = [json.dumps({"step": n, **line}) for n, line in enumerate(lines, start=1)]
    (folder / "metrics.jsonl").write_text("\n".join(records) + "\n")


@pytest.mark.more
@pytest.mark.parametrize(
    ("gpus", "decoding"),
    [("1", {"bandwidth_efficiency": 0.004}), ("2", {"decode_latency_per_layer": 0.0007})],
)
def test_values_derived_from_a_run_are_those_it_ran_with(tmp_path, capsys, gpus, decoding):
    truth = {"compute_efficiency": 0.31, "push_efficiency": 0.0125, **decoding}
    folder, file = tmp_path / "run", tmp_path / "measured.yaml"
    a_run(folder, tmp_path, truth, gpus)
    capsys.readouterr()
    assert main(["--calibrate-from", str(folder), str(file), *MODEL, "--gpus", gpus]) == 0
    derived = yaml.safe_load(file.read_text())
    assert derived.pop("hardware") == "H800" and derived.pop("prompt_tokens") == 20
    assert derived.pop("response_fraction") == 0.6 and derived.pop("gpus") == int(gpus)
    assert derived == pytest.approx(truth, rel=1e-6)
    left = capsys.readouterr().out.rpartition("not derived:")[2]
    names = {line.split()[0] for line in left.strip().splitlines()}
    assert {"link_efficiency", "reserved", "expert_imbalance", "rates"} <= names
    assert not names & derived.keys()
    # The plan with these values is the run.
    plan = tmp_path / "plan.json"
    options = ["--calibrate", str(file), "--gpus", gpus, "--json", str(plan)]
    assert main([str(folder / "config.yaml"), *MODEL, *options]) == 0
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    time = json.loads(plan.read_text())["sections"]["time"]
    assert time["push"]["value"] == pytest.approx(json.loads(lines[1])["time/push"], rel=1e-6)


@pytest.mark.parametrize(("drafts", "length"), [(1, 1.6), (2, 1 + 0.6 + 0.36)])
def test_the_drafts_that_a_run_accepted_are_derived(tmp_path, drafts, length):
    """Of six in ten right drafts one gains 1.6 tokens a pass, two gain 1.96."""
    model, folder, file = tmp_path / "model", tmp_path / "run", tmp_path / "measured.yaml"
    model.mkdir()
    small = {"num_hidden_layers": 4, "hidden_size": 256, "intermediate_size": 512}
    (model / "config.json").write_text(json.dumps(V3 | small))
    a_run(folder, tmp_path, {}, "1")
    recipe = yaml.safe_load((folder / "config.yaml").read_text())
    recipe["rollout"]["speculative"] = {"method": "mtp", "tokens": drafts}
    recipe["model"] |= {"path": str(model), "mtp": "frozen"}
    (folder / "config.yaml").write_text(yaml.safe_dump(recipe))
    record = {"step": 1, "speculative/length": length}
    (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    calibrate_from(folder, file, *parse_job_arguments(["--calibrate-from", str(folder), str(file)]))
    assert yaml.safe_load(file.read_text())["draft_acceptance"] == pytest.approx(0.6)


def test_seconds_that_no_value_explains_and_missing_runs_are_named(tmp_path, capsys):
    folder, file = tmp_path / "run", tmp_path / "measured.yaml"
    a_run(folder, tmp_path, {}, "1")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) | {"time/train": 1e-12} for line in lines]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert main(["--calibrate-from", str(folder), str(file), *MODEL]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "1e-12" in line)
    assert "compute_efficiency" in line and "time/train" in line
    assert "compute_efficiency" not in yaml.safe_load(file.read_text())
    run = parse_job_arguments(["--calibrate-from", str(folder), str(file), *MODEL])
    with refused("--calibrate-from", Cause.UNREADABLE, tmp_path):
        calibrate_from(folder, tmp_path, *run)
    (folder / "metrics.jsonl").unlink()
    with refused("--calibrate-from", Cause.EMPTY, folder, "metrics.jsonl"):
        calibrate_from(folder, file, *run)
    for options, cause in (([], Cause.MISSING), ([str(LAPTOP), "--published"], Cause.CONFLICT)):
        with refused("recipe", cause, "--published"):
            parse_job_arguments(options)
