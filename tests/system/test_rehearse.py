"""Shipped recipes in miniature, as a user rehearses them; defects that a rehearsal must name."""

import json
import subprocess
from pathlib import Path

import pytest
from command_line import command, environment

ROOT = Path(__file__).parents[2]
R1, DISTILL = ROOT / "examples/deepseek_r1", ROOT / "examples/distill"
# What examples/deepseek_r1/stage.sbatch adds to a recipe.
ON_HOSTS = ("--rollout.placement", "hosts", "--rollout.hosts_per_engine", "16")
GLOO = ("--push.transport", "gloo")
NEED_GPU = {"layers", "memory", "rollout.colocated"}
SETTINGS = {
    **dict.fromkeys(("reasoning_rl", "all_scenarios_rl"), (*ON_HOSTS, *GLOO)),
    **dict.fromkeys(
        ("cold_start_sampling", "rejection_sampling", "helpful_pairs", "safety_labels"), ON_HOSTS
    ),
    **dict.fromkeys(("cold_start_sft", "sft_800k", "helpful_rm", "safety_rm"), ()),
}
RECIPES = [R1 / f"{name}.yaml" for name in SETTINGS] + sorted(DISTILL.glob("*.yaml"))


def rehearse(recipe, folder, *settings, planted=None):
    env = environment()
    if planted:
        env |= {
            "PLANTED": planted,
            "PYTHONPATH": f"{ROOT / 'tests/system/planted'}:{env['PYTHONPATH']}",
        }
    return subprocess.run(
        command("rehearse", recipe, "--rehearsal.folder", folder, *settings),
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=3600,
    )


def test_r1_zero_on_2048_gpus_goes_through(tmp_path):
    done = rehearse(R1 / "r1_zero.yaml", tmp_path, *ON_HOSTS, *GLOO)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "r1_zero/rehearsal.json").read_text())
    structure = {row["what"]: row for row in found["structure"]}
    for axis in ("tensor", "context", "expert", "pipeline", "virtual_pipeline"):
        assert structure[f"parallel.{axis}"]["miniature"] == "2"
    not_exercised = {what for what, row in structure.items() if row["exercised"] != "yes"}
    assert not_exercised == {*NEED_GPU, "parallel.processes", "rollout.max_response_tokens"}
    assert [phase["phase"] for phase in found["phases"]] == [
        "start, first step, checkpoint, kill -9",
        "resume in another layout, to the end",
        "rollout, rewards, update",
        "push with proof",
        "export",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_goes_through(recipe, tmp_path):
    done = rehearse(recipe, tmp_path, *SETTINGS.get(recipe.stem, ()))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("planted", "message"),
    [
        ("mtp", "MTP layers (m) must stand there 0 times, not 1"),
        ("single_tokens", "log-probabilities of engine-"),
        ("undelivered", "log-probabilities of engine-"),
    ],
)
def test_a_defect_is_named(planted, message, tmp_path):
    done = rehearse(R1 / "r1_zero.yaml", tmp_path, *ON_HOSTS, *GLOO, planted=planted)
    assert done.returncode == 1, done.stdout + done.stderr
    log = "".join(path.read_text() for path in (tmp_path / "r1_zero").glob("log-*.txt"))
    assert message in log + done.stderr, done.stderr


def test_mistakes_are_refused(tmp_path):
    done = rehearse(ROOT / "examples/laptop/r1_zero.yaml", tmp_path, "--model.path", tmp_path)
    assert done.returncode == 2 and "config.json does not exist" in done.stderr, done.stderr
    done = rehearse(R1 / "r1_zero.yaml", tmp_path, "--rehearsal.max_rank", "4")
    assert done.returncode == 2 and "did you mean rehearsal.max_ranks" in done.stderr, done.stderr
