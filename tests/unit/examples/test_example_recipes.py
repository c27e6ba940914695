"""The real-size recipes: each can be planned and fits, and says what the paper says."""

import contextlib
import io
import json
from pathlib import Path

import pytest

from megatron_r1 import config as configuration
from megatron_r1.commands import cli
from megatron_r1.commands.plan import main
from megatron_r1.config import verb_of
from megatron_r1.models import read_hf_config
from megatron_r1.pipeline.pipeline_recipe import read_tree
from megatron_r1.plan.counts import ModelCounts

ROOT = Path(__file__).parents[3]

R1, DISTILL = ROOT / "examples/deepseek_r1", ROOT / "examples/distill"
STAGES = read_tree(R1 / "pipeline.yaml")["stages"].values()
VERBS = {Path(stage["recipe"]).stem: stage["verb"] for stage in STAGES}
EVALUATION = "evaluation"  # is not planned
del VERBS[EVALUATION]
DISTILLED = {  # table 6 of arXiv 2501.12948 v2, and the parameters that the models' pages show
    "qwen2.5-math-1.5b": (1e-4, 1_543_714_304),
    "qwen2.5-math-7b": (8e-5, 7_615_616_512),
    "qwen2.5-14b": (7e-5, 14_770_033_664),
    "qwen2.5-32b": (6e-5, 32_763_876_352),
    "llama-3.1-8b": (5e-5, 8_030_261_248),
    "llama-3.3-70b-instruct": (2e-5, 70_553_706_496),
}
RECIPES = [
    *(path for path in sorted(R1.glob("*.yaml")) if path.stem not in ("pipeline", EVALUATION)),
    *sorted(DISTILL.glob("*.yaml")),
    *sorted((ROOT / "examples/one_node").glob("*.yaml")),
]


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def planned(recipe: Path, tmp_path: Path, *options: str) -> dict:
    file = tmp_path / "plan.json"
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        assert main([str(recipe), "--json", str(file), *options]) == 0, output.getvalue()[-2000:]
    return json.loads(file.read_text())


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_can_be_planned_and_fits(recipe, tmp_path):
    plan = planned(recipe, tmp_path)
    verb = VERBS[recipe.stem] if recipe.parent == R1 else plan["verb"]
    assert plan["verb"] == verb and plan["problems"] == []
    titles = " ".join(plan["sections"])
    assert ("memory of pipeline rank" in titles) == (verb != "sample") == bool(plan["ranks"])
    assert ("engine memory of a GPU" in titles) == (verb in ("rl", "sample"))
    assert ("push" in plan["sections"]) == (verb == "rl")
    time = plan["sections"]["time"]
    assert ("rollout" in time) == (verb in ("rl", "sample")) and time["step"]["value"] > 0
    assert ("scoring" in time) == (verb == "rl") == any(rank["scoring"] for rank in plan["ranks"])


def test_a_reward_model_has_no_vocabulary_and_a_pair_is_two_samples(tmp_path):
    rl, rm = (planned(R1 / f"{name}.yaml", tmp_path) for name in ("r1_zero", "helpful_rm"))
    total = [plan["sections"]["parameters"]["total"]["value"] for plan in (rl, rm)]
    assert total[0] - total[1] == (129_280 - 1) * 7168
    labels = planned(R1 / "safety_rm.yaml", tmp_path)["sections"]["operations"]["optimizer step"]
    pairs = rm["sections"]["operations"]["optimizer step"]
    assert pairs["value"] == 2 * labels["value"]


def test_a_layout_of_sft_that_does_not_fit_names_those_that_do(capsys):
    recipe = str(DISTILL / "qwen2.5-32b.yaml")
    assert main([recipe, "--parallel.tensor", "1"]) == 1
    assert "--parallel.tensor" in capsys.readouterr().out


def test_a_batch_smaller_than_its_replicas_is_refused(capsys, monkeypatch):
    monkeypatch.setattr("megatron_r1.commands.plan.nearest", lambda job: [])
    recipe = str(DISTILL / "qwen2.5-math-1.5b.yaml")
    assert main([recipe, "--gpus", "128"]) == 1
    assert {"64", "128"} <= set(capsys.readouterr().out.split())


def test_an_examples_mean_length_is_at_most_its_longest(capsys):
    recipe = str(R1 / "helpful_rm.yaml")
    assert main([recipe, "--response-tokens", "8000"]) == 2
    assert "reward_model.max_tokens=7680" in capsys.readouterr().err


def test_the_teacher_of_on_policy_distillation_is_planned_beside(tmp_path):
    plan = planned(DISTILL / "qwen2.5-math-7b_on_policy.yaml", tmp_path)
    teacher = plan["sections"]["engine memory of a teacher's GPU"]
    assert teacher["weights"]["value"] == DISTILLED["qwen2.5-32b"][1] * 2 / 8


@pytest.mark.parametrize("name", DISTILLED)
def test_students_have_their_published_parameters_and_learning_rates(name):
    rate, count = DISTILLED[name]
    assert ModelCounts(read_hf_config(DISTILL / "models" / name)).total == count
    recipe = configuration.load(DISTILL / f"{name}.yaml")
    assert recipe.optimizer.learning_rate == rate
    assert recipe.optimizer.min_learning_rate == pytest.approx(rate / 10)
    assert (recipe.optimizer.decay, recipe.sft.batch_size) == ("cosine", 64)


def test_the_pipeline_is_a_graph_of_these_recipes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "models/DeepSeek-V3-Base").mkdir(parents=True)
    for name in ("reasoning", "all_scenarios", "non_reasoning_sft", "cold_start_questions"):
        (tmp_path / f"data/{name}.jsonl").parent.mkdir(exist_ok=True)
        (tmp_path / f"data/{name}.jsonl").touch()
    for name in ("helpful_questions", "safety_questions"):
        (tmp_path / f"data/{name}.jsonl").touch()
    recipe = "examples/deepseek_r1/pipeline.yaml"
    assert cli.main(["pipeline", recipe, "--pipeline.dry", "true"]) == 0
    output = capsys.readouterr().out
    assert "# all_scenarios_rl, after sft_800k, helpful_rm, safety_rm" in output
    assert "# evaluation, after all_scenarios_rl" in output
    written = {path.stem: path for path in (tmp_path / "runs/deepseek_r1/recipes").glob("*.yaml")}
    assert written.keys() == {*VERBS, EVALUATION}
    for name, verb in VERBS.items():
        assert verb_of(configuration.load(written[name])) == verb, name
