"""What a dry run shows of episodes, and that memory is checked before anything is sampled."""

import json
import re
from array import array
from pathlib import Path

import pytest
from refusals import refused

from megatron_r1.base.errors import Cause
from megatron_r1.base.files.framed_records import append_frame
from megatron_r1.commands import dry_run, run_costs
from megatron_r1.commands.parts import cpu_memory
from megatron_r1.config import Config, load_recipe
from megatron_r1.controller.rollouts.rollout import GradedResponse, Group, Rollout
from megatron_r1.controller.rollouts.sample_log import encode, to_record
from megatron_r1.data.prompt import Prompt
from megatron_r1.engines.episodes import Episode, Turn
from megatron_r1.engines.server.responses import Response

RECIPE = Path(__file__).parents[3] / "examples/deepseek_r1/r1_zero.yaml"


def test_an_episode_is_shown_with_resets_text_calls_and_results():
    turns = [
        Turn("system", "Follow the keys.", 0, False),
        Turn("user", "start: apple", 9, False),
        Turn("assistant", '<tool_call>{"name": "get"}</tool_call>', 5, True),
        Turn("tool", "error: no\x1b key", 4, False),
        Turn("assistant", "508", 2, True),
    ]
    episode = Episode("done", turns, [], num_tool_calls=1, num_tool_errors=1)
    response = Response(array("i", [1, 2]), array("f", [0.0, 0.0]), array("i", [0, 0]), "stop")
    graded = GradedResponse(response, "508", {"accuracy": 0.2}, 0.2, "done", episode=episode)
    group = Group(Prompt("p", "kv 3", "environment", None), [1], [graded])
    shown = dry_run._sample_text(group, 0, {"accuracy": 1.0})
    parts = ("apple", '<tool_call>{"name": "get"}</tool_call>', "no� key", "508", "1 failed", "0.2")
    places = [shown.index(part) for part in parts]
    assert places == sorted(places) and "Follow the keys." not in shown
    (counts,) = dry_run._describe_episodes(Rollout([group, group], 1.0, 0.0))
    assert "2 done" in counts and "2 failed" in counts


def test_a_truth_is_shown_with_its_spaces():
    response = Response(array("i", [1, 2]), array("f", [0.0, 0.0]), array("i", [0, 0]), "stop")
    graded = GradedResponse(response, "lion", {"accuracy": 0.0}, 0.0, "wrong")
    group = Group(Prompt("p", "lion, oak, elm", "odd:one", " lion "), [1], [graded])
    shown = dry_run._sample_text(group, 0, {"accuracy": 1.0})
    assert "lion, oak, elm" in shown and "' lion '" in shown and "wrong" in shown


def test_a_run_that_does_not_fit_is_refused_before_it_samples(tmp_path, monkeypatch):
    shape = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "max_position_embeddings": 256,
    }
    (tmp_path / "config.json").write_text(json.dumps(shape))
    monkeypatch.setattr(dry_run.gpu, "is_usable", lambda: False)
    monkeypatch.setattr(cpu_memory, "free_bytes", lambda: 1)
    config = Config.model_validate({"model": {"path": str(tmp_path)}})
    with refused("parallel.processes", Cause.TOO_LARGE, "GiB"):
        dry_run.show_batch(config, None, None)


def test_on_gpus_the_receive_buffer_of_an_engine_is_shown(monkeypatch):
    """As `megatron-r1 plan` has it for the recipe for 2,048 GPUs."""
    monkeypatch.chdir(RECIPE.parents[2])
    monkeypatch.setattr(dry_run.gpu, "is_usable", lambda: True)
    shown = run_costs.describe_run_memory(load_recipe(RECIPE))
    assert "24.69 GiB" in shown and "workspace of experts 3.50 GiB" in shown
    # 671,026,419,200 parameters in bf16: 2 B, gradient 4, master copy 4 and moments 4 or 8.
    moments = load_recipe(RECIPE).optimizer.moments
    each = {"bfloat16": 14, "float32": 18}[moments]
    assert f"{671_026_419_200 * each / 2**30:,.2f} GiB for weights" in shown


def test_an_engine_s_passes_are_those_of_the_gpu_that_is_there(monkeypatch):
    """By default vLLM's passes have 8,192 tokens on Hopper and 16,384 on Blackwell."""
    monkeypatch.chdir(RECIPE.parents[2])
    monkeypatch.setattr(dry_run.gpu, "is_usable", lambda: True)
    config = load_recipe(RECIPE, {"rollout.vllm": {}})
    for architecture, size in ((9, "28.00"), (10, "56.00"), (None, "28.00")):
        monkeypatch.setattr(dry_run.gpu, "architecture", lambda found=architecture: found)
        assert f"workspace of experts {size} GiB" in run_costs.describe_run_memory(config)


def test_the_size_of_a_kept_sample_log_is_that_of_the_file_that_a_run_writes(tmp_path):
    responses = [
        GradedResponse(
            Response(array("i", [7] * n), array("f", [-0.5] * n), array("i", [0] * n), "stop"),
            "lion" * n,
            {"accuracy": 1.0},
            1.0,
            "right",
        )
        for n in (200, 900)
    ]
    groups = [Group(Prompt("p", "lion, oak, elm", "odd:one", "lion"), [1] * 50, responses)] * 3
    path = tmp_path / "step.log"
    with open(path, "wb", buffering=0) as file:
        for index, group in enumerate(groups):
            append_frame(file.fileno(), encode(to_record(index, group)))
    settings = {"run": {"steps": 2_000}, "rl": {"keep_sample_log": True}}
    config = Config.model_validate(settings)
    # A step has 1,000 times the responses that were tried.
    (line,) = run_costs.kept_files_lines(config, Rollout(groups, 1.0, 0.0), 1_000.0)
    step_bytes = 1_000 * path.stat().st_size
    shown = [float(word) for word in re.findall(r"[\d,.]+\d", line.replace(",", ""))]
    assert shown[0] == pytest.approx(step_bytes / 1e6, rel=0.02), line
    assert shown[1] == pytest.approx(2_000 * step_bytes / 1e9, rel=0.02), line


def test_kept_checkpoints_of_adapters_are_as_large_as_their_factors(tmp_path):
    hf_config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": 512,
        "hidden_size": 4096,
        "intermediate_size": 16384,
        "num_attention_heads": 2,
        "num_hidden_layers": 64,
        "max_position_embeddings": 256,
    }
    (tmp_path / "config.json").write_text(json.dumps(hf_config))
    lora = {"rank": 64, "targets": ["down_proj"]}
    settings = {
        "run": {"folder": str(tmp_path / "run"), "steps": 10},
        "model": {"path": str(tmp_path), "dtype": "float32", "lora": lora},
        "rl": {"kl_beta": 0.0},
        "checkpoint": {"keep_every": 2},
    }
    (line,) = run_costs.kept_files_lines(
        Config.model_validate(settings), Rollout([], 1.0, 0.0), 1.0
    )
    num_parameters = 64 * 64 * (16384 + 4096)
    assert "5 checkpoints" in line
    # In fp32: the factors, the optimizer's copy of them, and its two moments.
    assert f"of {16 * num_parameters / 1e9:.2f} GB" in line
