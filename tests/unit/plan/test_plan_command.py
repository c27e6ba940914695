"""The command line of megatron-r1 plan: recipes and options that it plans, and those that it
refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from planned_jobs import LAPTOP, RECIPE, ROOT
from refusals import refused

from megatron_r1.base.errors import Cause
from megatron_r1.commands.plan import main
from megatron_r1.plan.job_options import parse_job_arguments
from megatron_r1.plan.recipe_job import planned_job

UNREPLAYED = ["--rl.routing_replay", "false"]
ONE_GPU = [
    "--rollout.tensor_parallel",
    "1",
    "--rollout.data_parallel",
    "1",
    "--rollout.redundant_experts",
    "0",
]


@pytest.mark.parametrize(
    "options, key, shows",
    [
        (["--parallel.tensor", "6"], "parallel", ["2048", "192"]),
        (["--parallel.expert", "3"], "parallel", ["2048"]),
        (["--parallel.sequence", "false"], "parallel.sequence", []),
        (["--parallel.pipeline_layout", "Et"], "parallel.pipeline_layout", ["Et"]),
        pytest.param(
            ["--rollout.engines", "2048", *ONE_GPU], "", ["1.19 TiB"], marks=pytest.mark.more
        ),
        (["--rollout.engines", "3", *ONE_GPU], "rollout.engines", ["2,048", "2 or 4"]),
        (
            ["--rollout.tensor_parallel", "3"],
            "rollout.tensor_parallel=3",
            ["num_attention_heads=128"],
        ),
        (
            ["--rollout.pipeline_parallel", "2"],
            "rollout.pipeline_parallel=2",
            ["rl.routing_replay"],
        ),
        (["--rollout.pipeline_parallel", "2", *UNREPLAYED], "rollout.pipeline_parallel=2", ["mtp"]),
        (["--rl.minibatches", "1024"], "rl.minibatches", ["8 samples", "16"]),
        (["--host-memory-gib", "1"], "parallel.reference_offload", []),
        (
            ["--host-memory-gib", "1", "--parallel.reference_offload", "device", *UNREPLAYED],
            *("checkpoint.asynchronous", ["of 8.00 GiB"]),
        ),
    ],
)
def test_what_does_not_work_is_named_in_the_bill(capsys, monkeypatch, options, key, shows):
    monkeypatch.setattr("megatron_r1.commands.plan.nearest_layouts", lambda job: [])
    assert main([str(RECIPE), "--gpus", "2048", *options]) == 1
    output = " ".join(capsys.readouterr().out.split())
    assert [part for part in (key, *shows) if part not in output] == []


@pytest.mark.parametrize(
    "options, key, cause, shows",
    [
        (["--gpus", "-1"], "--gpus", Cause.OUT_OF_RANGE, [-1]),
        (["--memory-gib", "0"], "--memory-gib", Cause.OUT_OF_RANGE, [0.0]),
        (["--memory-gib", "nan"], "--memory-gib", Cause.OUT_OF_RANGE, ["nan"]),
        (["--response-tokens", "99999"], "--response-tokens", Cause.TOO_LARGE, [99999, 32768]),
        (["--gpuss", "8"], "--gpuss", Cause.UNKNOWN, ["--gpus"]),
    ],
)
def test_an_impossible_option_is_refused(options, key, cause, shows):
    with refused(key, cause, *shows):
        chosen, overrides = parse_job_arguments([str(RECIPE), *options])
        planned_job(RECIPE, chosen, overrides)


@pytest.mark.parametrize(
    "options, shows",
    [
        (["--rollout.max_response_tokens", "67584"], "rollout.max_model_len"),
        (["--prompt-tokens", "2049"], "2048"),  # of the phase with the longest responses
        (["--parallel.tensr", "2"], "parallel.tensor"),
    ],
)
def test_a_wrong_setting_is_refused(capsys, options, shows):
    assert main([str(RECIPE), *options]) == 2
    assert shows in capsys.readouterr().err


def test_several_recipes_have_a_bill_each_and_a_verdict_at_the_end(capsys):
    recipes = [RECIPE.parent / f"{n}.yaml" for n in ("cold_start_sampling", "pipeline", "r1_zero")]
    assert main([*map(str, recipes), "--gpus", "128"]) == 2
    captured = capsys.readouterr()
    assert [line[3:-3] for line in captured.out.splitlines() if line.startswith("== ")] == [
        str(path) for path in recipes
    ]
    verdicts = ("fits", "refused", "does not fit")
    for line, verdict, path in zip(captured.out.splitlines()[-3:], verdicts, recipes, strict=True):
        assert line.endswith(str(path))
        assert line.removesuffix(str(path)).strip() == verdict
    assert "pipeline.yaml" in captured.err
    assert main([str(recipes[0]), str(recipes[2]), "--gpus", "128"]) == 1
    assert main([str(recipes[0])] * 2) == 0
    capsys.readouterr()
    assert main([str(recipes[0])]) == 0
    assert capsys.readouterr().out.endswith(f"\nfits: {recipes[0]}\n")
    with refused("--json", Cause.CONFLICT, 3):
        parse_job_arguments([*map(str, recipes), "--json", "plan.json"])


@pytest.mark.parametrize(
    ("recipe", "options", "key", "cause"),
    [
        ("deepseek_r1", [], "recipe", Cause.NOT_FOUND),
        ("deepseek_r1/pipeline.yaml", [], "recipe", Cause.UNSUPPORTED),
        ("deepseek_r1/cold_start_sft.yaml", ["--rollout-gpus", "8"], "--rollout-gpus", None),
        ("deepseek_r1/helpful_pairs.yaml", ["--rollout-gpus", "8"], "--rollout-gpus", None),
        (
            "distill/qwen2.5-math-7b_on_policy.yaml",
            ["--teacher.path", "gone"],
            "teacher.path",
            Cause.NOT_FOUND,
        ),
        ("laptop/eval.yaml", [], "eval.benchmarks", Cause.UNSUPPORTED),
    ],
)
def test_what_cannot_be_planned_is_refused_by_name(recipe, options, key, cause):
    recipe = ROOT / "examples" / recipe
    with refused(key, cause or Cause.CONFLICT):
        chosen, overrides = parse_job_arguments([str(recipe), *options])
        planned_job(recipe, chosen, overrides)


def test_settings_are_those_of_the_other_commands():
    template, schedule = "Solve {question} now", "[{from_step: 2, rl.group_size: 8}]"
    words = ["--data.template", template, "a.yaml", "--rl.schedule", schedule, "b.yaml"]
    words += ["--gpus=8", "--rollout.colocated", "--hardware", "H200", "--rl.kl_beta", "-1"]
    chosen, overrides = parse_job_arguments([*words, "--rl.sample_log"])
    assert (chosen.recipes, chosen.gpus) == ([Path("a.yaml"), Path("b.yaml")], 8)
    assert chosen.hardware == "H200"
    assert overrides == {
        "data.template": template,
        "rl.schedule": [{"from_step": 2, "rl.group_size": 8}],
        "rollout.colocated": True,
        "rl.kl_beta": -1,
        "rl.sample_log": True,
    }


def test_a_folder_in_place_of_the_json_file_is_refused(tmp_path, capsys):
    assert main([*LAPTOP, "--json", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "--json" in error and str(tmp_path) in error


def test_a_teacher_that_cannot_be_counted_is_planned_without(tmp_path, capsys):
    teacher, file = tmp_path / "teacher", tmp_path / "plan.json"
    teacher.mkdir()
    config = {"architectures": ["OtherForCausalLM"], "max_position_embeddings": 32_768}
    (teacher / "config.json").write_text(json.dumps(config))
    recipe = str(ROOT / "examples/distill/qwen2.5-math-7b_on_policy.yaml")
    assert main([recipe, "--teacher.path", str(teacher), "--json", str(file)]) == 0
    weights_of = json.loads(file.read_text())["sections"]["engine memory of a teacher's GPU"]
    assert weights_of["weights"]["value"] is None
    assert "OtherForCausalLM" in weights_of["weights"]["formula"]


def test_each_of_several_teachers_is_planned(tmp_path):
    recipe = yaml.safe_load((ROOT / "examples/distill/qwen2.5-math-7b_on_policy.yaml").read_text())
    model = recipe["model"]["path"]
    recipe["teacher"]["by_source"] = {"code": {"path": model, "tensor_parallel": 2, "engines": 3}}
    file, plan = tmp_path / "recipe.yaml", tmp_path / "plan.json"
    file.write_text(yaml.safe_dump(recipe))
    assert main([str(file), "--json", str(plan)]) == 0
    sections = json.loads(plan.read_text())["sections"]
    first = sections["engine memory of a teacher's GPU"]
    second = sections["engine memory of a teacher's GPU, teacher.by_source.code"]
    assert (
        "on 6 GPUs" in second["logprobs of a rollout"]["formula"]
        and "/ 2 GPUs" in (second["weights"]["formula"])
    )
    assert first != second


def test_every_recipe_of_a_dense_or_small_model_can_be_planned(capsys):
    assert main(LAPTOP) == 0
    assert "pipeline 1 x 1" in capsys.readouterr().out


@pytest.mark.more
def test_planning_needs_no_torch():
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from megatron_r1.commands.plan import main\n"
        f"main([{str(RECIPE)!r}])\n"
        "assert not {'torch', 'megatron'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
