"""The real-size recipes: each can be planned and fits, and says what the paper says."""

import contextlib
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_r1 import config as configuration
from megatron_r1.commands import cli
from megatron_r1.commands.plan import main
from megatron_r1.config import infer_verb
from megatron_r1.engines.server.recipe_checks import num_experts
from megatron_r1.models import read_hf_config
from megatron_r1.models.weights.layout import parameter_layout, recipe_stages
from megatron_r1.pipeline.pipeline_recipe import read_tree
from megatron_r1.plan.counts import ModelCounts
from megatron_r1.rehearse import miniature

ROOT = Path(__file__).parents[3]

R1, DISTILL = ROOT / "examples/deepseek_r1", ROOT / "examples/distill"
STAGES = read_tree(R1 / "pipeline.yaml")["stages"].values()
VERBS = {Path(stage["recipe"]).stem: stage["verb"] for stage in STAGES}
EVALUATION = "evaluation"  # is not planned
del VERBS[EVALUATION]
VARIANTS = {"r1_zero_pools": "rl", "r1_zero_fp8": "rl"}  # of a stage
DISTILLED = {  # table 6 of arXiv 2501.12948 v2, and the parameters that the models' pages show
    "qwen2.5-math-1.5b": (1e-4, 1_543_714_304),
    "qwen2.5-math-7b": (8e-5, 7_615_616_512),
    "qwen2.5-14b": (7e-5, 14_770_033_664),
    "qwen2.5-32b": (6e-5, 32_763_876_352),
    "llama-3.1-8b": (5e-5, 8_030_261_248),
    "llama-3.3-70b-instruct": (2e-5, 70_553_706_496),
}
LONG_TO_PLAN = ("all_scenarios_rl", "r1_zero_pools")
"""A plan of a push of 671B parameters takes 10 CPU seconds."""
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


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(path, marks=pytest.mark.more) if path.stem in LONG_TO_PLAN else path
        for path in RECIPES
    ],
    ids=lambda path: path.stem,
)
def test_every_recipe_can_be_planned_and_fits(recipe, tmp_path):
    plan = planned(recipe, tmp_path)
    verb = (VERBS | VARIANTS)[recipe.stem] if recipe.parent == R1 else plan["verb"]
    assert plan["verb"] == verb and plan["problems"] == []
    titles = " ".join(plan["sections"])
    assert ("memory of pipeline rank" in titles) == (verb != "sample") == bool(plan["ranks"])
    assert ("engine memory of a GPU" in titles) == (verb in ("rl", "sample"))
    assert ("push" in plan["sections"]) == (verb == "rl")
    time = plan["sections"]["time"]
    assert ("rollout" in time) == (verb in ("rl", "sample")) and time["step"]["value"] > 0
    assert ("logprobs" in time) == (verb == "rl") == any(rank["logprobs"] for rank in plan["ranks"])


@pytest.mark.parametrize(
    ("name", "differ"),
    [
        (
            "r1_zero_pools",
            "run.folder rollout.placement rollout.hosts_per_engine rollout.engines "
            "rollout.colocated rollout.gpu_memory rollout.vllm.max_num_batched_tokens "
            "rl.staleness parallel.processes parallel.pipeline parallel.virtual_pipeline",
        ),
        (
            "r1_zero_fp8",
            "run.folder fp8.recipe fp8.scales push.fp8 rollout.gpu_memory rollout.vllm.moe_backend",
        ),
    ],
)
def test_a_variant_of_r1_zero_differs_where_its_comments_say(name, differ):
    def settings(stem: str) -> set[tuple[str, str]]:
        recipe = configuration.load_recipe(R1 / f"{stem}.yaml")
        values = {f"{section}.{key}": value for section, part in recipe for key, value in part}
        arguments = values.pop("rollout.vllm")
        values |= {f"rollout.vllm.{key}": value for key, value in arguments.items()}
        return {(key, repr(value)) for key, value in values.items()}

    found = {key for key, _ in settings("r1_zero") ^ settings(name)}
    assert found == set(differ.split())


def test_rl_of_a_mixture_of_experts_in_bf16_replays_its_routing_and_balances_its_experts():
    """A recipe without one of them still fits; r1_zero.yaml says what they are for."""
    recipes = {path.stem: configuration.load_recipe(path) for path in RECIPES}
    chosen = {
        name: config
        for name, config in recipes.items()
        if infer_verb(config) == "rl"
        and config.model.dtype == "bfloat16"
        and num_experts(read_hf_config(config.model.path))
    }
    assert chosen.keys() == {"r1_zero", "reasoning_rl", "all_scenarios_rl", *VARIANTS}
    for name, config in chosen.items():
        for _, part in config.schedule_parts():
            assert part.rl.routing_replay and part.rl.importance_cap, name
        assert config.rollout.redundant_experts, name


@pytest.mark.more
def test_in_pools_sampling_and_training_overlap_on_512_gpus_each(tmp_path):
    plan = planned(R1 / "r1_zero_pools.yaml", tmp_path)
    sections = plan["sections"]
    assert plan["gpus"] == 512 and "rl.staleness=1" in sections["time"]["step"]["formula"]
    assert "512 GPUs" in sections["push"]["into all engines"]["formula"]
    # What a push receives is not in the place of the cache: both fit next to the weights.
    engine = sections["engine memory of a GPU"]
    taken = 2 * engine["weights"]["value"] + engine["KV cache"]["value"]
    assert taken < plan["hardware"]["memory"] - plan["assumptions"]["reserved"]


@pytest.mark.more
def test_in_fp8_half_of_the_bytes_are_pushed_and_two_copies_are_kept(tmp_path):
    plain, fp8 = (planned(R1 / f"{name}.yaml", tmp_path) for name in ("r1_zero", "r1_zero_fp8"))
    into = [plan["sections"]["push"]["into an engine GPU"]["value"] for plan in (plain, fp8)]
    assert 0.5 < into[1] / into[0] < 0.53  # scales, and what is no projection, in bf16
    copies = [plan["ranks"][3]["training"]["fp8 copies"] for plan in (plain, fp8)]
    assert copies == [0, 2 * (283_967_488 + 5_637_144_576)]  # 1 B of each trained parameter, twice


def test_what_fp8_rounds_has_sizes_that_the_matrix_units_take():
    """On every rank of the recipe and of its rehearsal: multiples of 16 (docs/fp8.md)."""
    recipe = configuration.load_recipe(R1 / "r1_zero_fp8.yaml")
    hf_config = read_hf_config(recipe.model.path)
    small = miniature.make_miniature(recipe, hf_config, Path("rehearsal"), 16)
    for config, model in ((recipe, hf_config), (small.config, small.hf_config)):
        parallel = config.parallel
        at = {"tp": (0, parallel.tensor), "ep": (0, parallel.expert)}
        shapes = {
            name: entry.shape
            for stage in recipe_stages(config, model)
            for chunk in stage
            for name, entry in parameter_layout(model, replace(chunk, **at)).items()
            if re.search(r"\b(linear_\w+|eh_proj)\.weight\d*$", name)
        }
        assert len(shapes) > 20
        assert {n: s for n, s in shapes.items() if any(size % 16 for size in s)} == {}


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
    monkeypatch.setattr("megatron_r1.commands.plan.nearest_layouts", lambda job: [])
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
    assert ModelCounts(read_hf_config(DISTILL / "models" / name)).num_total == count
    recipe = configuration.load_recipe(DISTILL / f"{name}.yaml")
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
        assert infer_verb(configuration.load_recipe(written[name])) == verb, name
