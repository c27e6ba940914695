"""The command line of tools/plan: recipes and options that it plans, and those that it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from planned_jobs import LAPTOP, RECIPE, ROOT

from tools.plan.arguments import parse
from tools.plan.command import main

ONE_GPU = ["--rollout.tensor", "1", "--rollout.data", "1"]


@pytest.mark.parametrize(
    "options, status, message",
    [
        (["--parallel.tensor", "6"], 1, "2048 trainer ranks cannot be divided into groups of 192"),
        (["--parallel.expert", "3"], 1, "parallel.expert=3 does not divide|groups of"),
        (["--parallel.sequence", "false"], 1, "cannot work: parallel.sequence: false: Megatron's"),
        (["--parallel.pipeline_layout", "Et"], 1, "pipeline_layout='Et'"),
        (["--rollout.engines", "2048", *ONE_GPU], 1, "1.19 TiB short, for KV cache beside"),
        (["--rollout.engines", "3", *ONE_GPU], 1, "does not divide 2,048 GPUs; choose 2 or 4"),
        (["--rollout.tensor", "3"], 1, "rollout.tensor=3 does not divide num_attention_heads=128"),
        (["--rollout.pipeline", "2"], 1, "mtp with rollout.pipeline=2: a drafter behind stages"),
        (
            ["--rl.minibatches", "1024"],
            1,
            "8 samples of an optimizer step cannot be spread over 16",
        ),
        (["--gpus", "-1"], 2, "--gpus: -1"),
        (["--memory-gib", "0"], 2, "--memory-gib: 0.0 is not a finite number above 0"),
        (["--rollout.max_response_tokens", "67584"], 2, "or raise rollout.max_model_len"),
        (["--response-tokens", "99999"], 2, "above rollout.max_response_tokens=32768"),
        (["--parallel.tensr", "2"], 2, "did you mean parallel.tensor"),
        (["--gpuss", "8"], 2, "unknown option --gpuss; did you mean --gpus?"),
        (["--memory-gib", "nan"], 2, "--memory-gib: nan is not a finite number"),
        (["--prompt-tokens", "2049"], 2, "there is room for 2048; lower it, or raise rollout.max"),
        (
            ["--host-memory-gib", "1", "--push.memory_gib", "2"],
            1,
            "being written: set checkpoint.asynchronous to false",
        ),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(capsys, monkeypatch, options, status, message):
    monkeypatch.setattr("tools.plan.command.nearest", lambda job: [])
    assert main([str(RECIPE), "--gpus", "2048", *options]) == status
    captured = capsys.readouterr()
    assert any(part in captured.out + captured.err for part in message.split("|"))


def test_several_recipes_have_a_bill_each_and_a_verdict_at_the_end(capsys):
    recipes = [RECIPE.parent / f"{n}.yaml" for n in ("cold_start_sampling", "pipeline", "r1_zero")]
    assert main([*map(str, recipes), "--gpus", "128"]) == 2
    captured = capsys.readouterr()
    assert [line[3:-3] for line in captured.out.splitlines() if line.startswith("== ")] == [
        str(path) for path in recipes
    ]
    verdicts = [line.rsplit(maxsplit=1) for line in captured.out.splitlines()[-3:]]
    assert verdicts == [
        ["fits", str(recipes[0])],
        ["refused", str(recipes[1])],
        ["does not fit", str(recipes[2])],
    ]
    assert "pipeline.yaml is a pipeline; plan the recipes of its stages" in captured.err
    assert main([str(recipes[0]), str(recipes[2]), "--gpus", "128"]) == 1
    assert main([str(recipes[0])] * 2) == 0
    capsys.readouterr()
    assert main([*map(str, recipes), "--json", "plan.json"]) == 2
    assert "--json: one recipe at a time, 3 are named" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        ("deepseek_r1", [], "is a folder; name a recipe in it"),
        ("deepseek_r1/cold_start_sft.yaml", ["--rollout-gpus", "8"], "sft has no engines; leave"),
        ("deepseek_r1/helpful_pairs.yaml", ["--rollout-gpus", "8"], "beside its engines; use --g"),
        ("distill/qwen2.5-math-7b_on_policy.yaml", ["--teacher.path", "gone"], "teacher.path must"),
        ("laptop/eval.yaml", [], "eval.yaml is for eval (eval.benchmarks, and neither"),
    ],
)
def test_what_cannot_be_planned_is_refused_by_name(capsys, recipe, options, message):
    assert main([str(ROOT / "examples" / recipe), *options]) == 2
    assert message in capsys.readouterr().err


def test_settings_are_those_of_the_other_commands():
    template, schedule = "Solve {problem} now", "[{from_step: 2, rl.group_size: 8}]"
    words = ["--data.template", template, "a.yaml", "--rl.schedule", schedule, "b.yaml"]
    words += ["--gpus=8", "--rollout.colocated", "--hardware", "H200", "--rl.kl_beta", "-1"]
    chosen, overrides = parse([*words, "--rl.sample_log"])
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
    assert f"--json: {tmp_path} cannot be written: Is a directory" in capsys.readouterr().err


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


def test_every_recipe_of_a_dense_or_small_model_can_be_planned(capsys):
    assert main(LAPTOP) == 0
    assert "pipeline 1 x 1" in capsys.readouterr().out


def test_planning_needs_no_torch():
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from tools.plan.command import main\n"
        f"main([{str(RECIPE)!r}])\n"
        "assert not {'torch', 'megatron'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
