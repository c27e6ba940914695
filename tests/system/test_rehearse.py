"""Shipped recipes in miniature, as a user rehearses them; defects that a rehearsal must name.

With REHEARSE_JSON=docs/benchmarks/rehearse.json the tables of what went through are kept there."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from command_line import command, environment

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
R1, DISTILL, LAPTOP = (EXAMPLES / name for name in ("deepseek_r1", "distill", "laptop"))
AGENTS, PAPER, SMOLLM2 = (EXAMPLES / name for name in ("agents", "paper", "smollm2"))
# What examples/deepseek_r1/stage.sbatch adds to a recipe.
ON_HOSTS = ("--rollout.placement", "hosts", "--rollout.hosts_per_engine", "16")
PLACED = ("--rollout.placement", "hosts")
GLOO = ("--push.transport", "gloo")
# examples/deepseek_r1/pools.sbatch; a GPU would push by nccl.
APART = (
    *("--rollout.colocated", "false"),
    *("--rl.staleness", "1", "--rl.importance_cap", "2"),
)
# The demo's base model is there after base.yaml, and stages of the pipeline write their shapes.
LAPTOP_MODEL = ("--model.path", LAPTOP / "model")
QWEN, LLAMA = DISTILL / "models/qwen2.5-math-1.5b", DISTILL / "models/llama-3.1-8b"
BASE = ("--stages.base.model.path", LAPTOP / "model")
SHAPES = (*BASE, "--stages.qwen_base.model.path", QWEN, "--stages.llama_base.model.path", LLAMA)
# One stage of each verb; test_r1_recipe.py runs them all.
OF_LAPTOP = "[r1, cold_start_data, preferences, helpful]"
# A node of 8 ranks, or two of them, with the recipe that examples/slurm starts by itself.
NODE = (*LAPTOP_MODEL, "--parallel.processes", "8")
NODES = (*NODE, "--rollout.placement", "hosts", "--rollout.engines", "2", *GLOO)
SHIPPED = {
    **{
        name: (R1, name, ON_HOSTS)
        for name in (
            *("reasoning_rl", "all_scenarios_rl", "cold_start_sampling", "rejection_sampling"),
            *("helpful_pairs", "safety_labels"),
        )
    },
    **{name: (R1, name, ()) for name in ("cold_start_sft", "sft_800k", "helpful_rm", "safety_rm")},
    "pools": (R1, "r1_zero", (*ON_HOSTS, *GLOO, *APART)),
    "r1_zero_pools": (R1, "r1_zero_pools", ()),
    "r1_zero_fp8": (R1, "r1_zero_fp8", ON_HOSTS),
    "pipeline": (R1, "pipeline", ("--rehearsal.stages", "[cold_start_sampling, cold_start_sft]")),
    **{path.stem: (DISTILL, path.stem, ()) for path in sorted(DISTILL.glob("*.yaml"))},
    "qwen2.5-7b": (EXAMPLES / "one_node", "qwen2.5-7b", ()),
    # What examples/slurm/colocated.sbatch adds.
    **{name: (DISTILL, name, PLACED) for name in ("qwen2.5-32b_rl", "qwen2.5-math-7b_on_policy")},
    "laptop-base": (LAPTOP, "base", ("--sft.data", "runs/demo/base.jsonl")),
    "laptop-r1_zero": (LAPTOP, "r1_zero", LAPTOP_MODEL),
    "laptop-r1": (LAPTOP, "r1", (*SHAPES, "--rehearsal.stages", OF_LAPTOP)),
    # Models that their demos fetch or write.
    "smollm2-rl": (SMOLLM2, "rl", ("--model.path", LLAMA)),
    "smollm2-chain": (
        *(SMOLLM2, "chain"),
        ("--stages.sft.model.path", LLAMA, "--rehearsal.stages", "[sft, rl, answers]"),
    ),
    "smollm2-python_tool": (
        *(SMOLLM2, "python_tool"),
        ("--stages.rl.model.path", QWEN, "--rehearsal.stages", "[rl]"),
    ),
    "agents-base": (AGENTS, "base", ("--model.path", QWEN)),
    "agents-lookup": (AGENTS, "lookup", ("--model.path", QWEN)),
    # What laptop-r1 has not: a critic, and a served reward alone.
    "paper": (PAPER, "paper", (*BASE, "--rehearsal.stages", "[ppo_095, rlhf]")),
    "slurm-one_node": (LAPTOP, "r1_zero", NODE),
    "slurm-colocated": (
        *(LAPTOP, "r1_zero"),
        (*NODES, "--rollout.colocated", "true", "--rollout.gpu_memory", "0.5"),
    ),
    "slurm-pools": (LAPTOP, "r1_zero", NODES),
}
NEED_GPU = {
    "layers",
    "memory",
    "rollout.colocated",
    "rollout.redundant_experts",
    "rollout.vllm",
}


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
    )


def keep(name, folder):
    """Put the tables of a rehearsal into the file that REHEARSE_JSON names."""
    if file := os.environ.get("REHEARSE_JSON"):
        written = sorted(folder.glob("*/rehearsal.json"), key=lambda path: path.stat().st_mtime)
        found = json.loads(Path(file).read_text())
        # Paths as a recipe has them, not those of the checkout that ran it, or of its miniature.
        # The table cuts a long value, which then has a part of the folder's name.
        cut = re.compile(rf'{re.escape(str(folder.parent))}[^"]*')
        texts = (
            cut.sub("FOLDER", path.read_text().replace(f"{ROOT}/", "").replace(f"{folder}/", ""))
            for path in written
        )
        found[name] = [json.loads(text) for text in texts]
        lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in found.items())
        Path(file).write_text("{\n" + ",\n".join(lines) + "\n}\n")


@pytest.mark.more
def test_r1_zero_on_2048_gpus_goes_through(tmp_path):
    done = rehearse(R1 / "r1_zero.yaml", tmp_path, *ON_HOSTS)
    assert done.returncode == 0, done.stdout + done.stderr
    keep("r1_zero", tmp_path)
    found = json.loads((tmp_path / "r1_zero/rehearsal.json").read_text())
    structure = {row["what"]: row for row in found["structure"]}
    for axis in ("tensor", "context", "expert", "pipeline", "virtual_pipeline"):
        assert structure[f"parallel.{axis}"]["miniature"] == "2"
    not_exercised = {what for what, row in structure.items() if row["exercised"] != "yes"}
    # Shorter and fewer; NCCL becomes gloo.
    shorter = {"parallel.processes", "rollout.max_response_tokens", "push.transport"}
    assert not_exercised == NEED_GPU | shorter
    assert [phase["phase"] for phase in found["phases"]] == [
        "start, first step, checkpoint, kill -9",
        "links",
        "resume in another layout, to the end",
        "schedule",
        "rollout, rewards, update",
        "push with proof",
        "export",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_recipe_goes_through(name, tmp_path):
    folder, recipe, settings = SHIPPED[name]
    done = rehearse(folder / f"{recipe}.yaml", tmp_path, *settings)
    assert done.returncode == 0, done.stdout + done.stderr
    keep(name, tmp_path)


def test_all_shipped_recipes_are_among_them():
    rehearsed = {(folder / f"{recipe}.yaml") for folder, recipe, _ in SHIPPED.values()}
    rehearsed.add(R1 / "r1_zero.yaml")
    evaluations = {LAPTOP / "eval.yaml", R1 / "evaluation.yaml"}  # these train nothing
    assert set(EXAMPLES.rglob("*.yaml")) - rehearsed == {*evaluations, PAPER / "published.yaml"}


def test_the_page_has_every_rehearsal_with_its_figures():
    benchmarks = ROOT / "docs/benchmarks"
    kept = json.loads((benchmarks / "rehearse.json").read_text())
    assert kept.keys() <= {"r1_zero", *SHIPPED}
    rows = (benchmarks / "rehearse.md").read_text().splitlines()
    for name, found in kept.items():
        for each in found:
            timed = [phase for phase in each["phases"] if phase["cpu_seconds"] is not None]
            wall, cpu = (round(sum(p[key] for p in timed)) for key in ("seconds", "cpu_seconds"))
            figures = re.compile(rf"\| {wall} \| {cpu}( †)? \|")
            of_it = [row for row in rows if each["recipe"] in row and figures.search(row)]
            assert of_it, f"{name}: {each['recipe']} has no row with | {wall} | {cpu} |"


@pytest.mark.parametrize(
    ("script", "settings"),
    [
        ("deepseek_r1/stage.sbatch", (*ON_HOSTS, *GLOO, "--rollout.start_timeout_seconds", "1")),
        (
            "deepseek_r1/pools.sbatch",
            (*GLOO, *APART, "--rollout.start_timeout_seconds", "1"),
        ),
        ("slurm/one_node.sbatch", ()),
        ("slurm/colocated.sbatch", (*SHIPPED["slurm-colocated"][2], *ON_HOSTS)),
        ("slurm/pools.sbatch", (*SHIPPED["slurm-pools"][2], *ON_HOSTS)),
    ],
)
def test_what_slurm_scripts_add_is_rehearsed(script, settings):
    added = re.findall(r"--((?:rollout|push|rl)\.\w+) ", (ROOT / "examples" / script).read_text())
    given = {str(setting).removeprefix("--") for setting in settings}
    assert set(added) <= given
    assert added or script == "slurm/one_node.sbatch"


ZERO = (R1 / "r1_zero.yaml", *ON_HOSTS)
SMALL = (LAPTOP / "r1_zero.yaml", *LAPTOP_MODEL)
LONGER = ("--rl.schedule", "[{from_step: 20, rollout.max_response_tokens: 128}]")
QUICK = ("--run.hang_seconds", "60")
# With drafts, the last sequence of a rank has two tokens a pass, and few batches have one.
UNDRAFTED = ("--rollout.speculative.method", "none")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("planted", "recipe", "message"),
    [
        ("mtp", ZERO, "MTP layers (m) must stand there 0 times, not 1"),
        ("all_pairs", ZERO, "links to engine ranks, where its plan"),
        ("split_shared", ZERO, "bytes, where their plan"),
        ("single_tokens", (*ZERO, *UNDRAFTED), "log-probabilities of engine-"),
        ("left_out_drafter", ZERO, "the engine takes no pushes of"),
        ("undelivered", SMALL, "are not what the engine computes with"),
        ("trained", (R1 / "cold_start_sft.yaml",), "model.mtp: frozen, but"),
        ("schedule", (*SMALL, *LONGER), "rl.schedule: rollout.max_response_tokens of the steps"),
        ("lost", (*SMALL, *QUICK), "nothing has moved for"),
        ("blocked", (*SMALL, *QUICK), "the controller does not answer; its stacks"),
    ],
)
def test_a_defect_is_named(planted, recipe, message, tmp_path):
    done = rehearse(recipe[0], tmp_path, *recipe[1:], planted=planted)
    assert done.returncode in (1, 2), done.stdout + done.stderr
    assert message in done.stderr, done.stderr


@pytest.mark.more
def test_mistakes_are_refused(tmp_path):
    done = rehearse(ROOT / "examples/laptop/r1_zero.yaml", tmp_path, "--model.path", tmp_path)
    assert done.returncode == 2 and "config.json does not exist" in done.stderr, done.stderr
    # A phase of the schedule for which the engines have no room, and more stages than the pushes
    # know: the miniature has neither.
    longer = ("--rl.schedule", "[{from_step: 9, rollout.max_response_tokens: 131072}]")
    done = rehearse(R1 / "r1_zero.yaml", tmp_path, *longer)
    assert done.returncode == 2 and "131072 leaves no room" in done.stderr, done.stderr
    without = ("--model.mtp", "none", "--rollout.speculative.method", "none")
    done = rehearse(R1 / "r1_zero.yaml", tmp_path, *without)
    assert done.returncode == 2 and "(m) must stand there 0 times" in done.stderr, done.stderr
    done = rehearse(R1 / "r1_zero.yaml", tmp_path, "--rehearsal.max_rank", "4")
    assert done.returncode == 2 and "did you mean rehearsal.max_ranks" in done.stderr, done.stderr
