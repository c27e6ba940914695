"""Arguments that a recipe hands to vLLM: their form, what is refused, and vLLM's own parser as the
judge of names and values."""

import json
from pathlib import Path

import pytest
from refusals import refused

from megatron_r1.base.errors import Cause
from megatron_r1.config import parse_recipe
from megatron_r1.engines.server import vllm_arguments
from megatron_r1.engines.server.recipe_checks import check_engines
from megatron_r1.engines.server.recipe_settings import engine_settings
from megatron_r1.engines.server.settings import EngineSettings
from megatron_r1.engines.server.vllm_arguments import (
    FIXED_ARGUMENTS,
    RESERVED_ARGUMENTS,
    SERVER_ARGUMENTS,
    argument_list,
    check_arguments,
    check_reserved,
)
from megatron_r1.pipeline.pipeline_recipe import read_tree

R1 = Path(__file__).parents[4] / "examples/deepseek_r1"
FREE = {"enforce_eager", "async_scheduling", "disable_log_stats", "disable_uvicorn_access_log"}
"""What engines get on a CPU, or for their log, and a recipe may change."""
HF = {"architectures": ["Qwen2ForCausalLM"], "num_attention_heads": 2, "vocab_size": 64}


def rollout(**vllm):
    return parse_recipe({"rollout": {"vllm": vllm}}).rollout


def test_values_are_written_as_the_command_line_has_them():
    values = {
        "enable_dbo": True,
        "enable-chunked-prefill": False,
        "kv_cache_dtype": "fp8",
        "max_num_batched_tokens": 8192,
        "cudagraph_capture_sizes": [1, 2, 4],
        "compilation_config": {"cudagraph_mode": "FULL"},
    }
    assert argument_list(values) == [
        "--enable-dbo",
        "--no-enable-chunked-prefill",
        *("--kv-cache-dtype", "fp8"),
        *("--max-num-batched-tokens", "8192"),
        *("--cudagraph-capture-sizes", "1", "2", "4"),
        *("--compilation-config", '{"cudagraph_mode": "FULL"}'),
    ]


def test_an_engine_of_the_recipe_gets_them_after_its_own():
    settings = EngineSettings(**engine_settings(rollout(kv_cache_dtype="fp8")), extra_args=["last"])
    assert settings.arguments(Path("model"))[-3:] == ["--kv-cache-dtype", "fp8", "last"]


def test_copies_of_experts_come_with_vllms_balancer():
    given = {"rollout": {"redundant_experts": 32, "vllm": {"eplb_config": {"step_interval": 9}}}}
    words = EngineSettings(**engine_settings(parse_recipe(given).rollout)).arguments(Path("model"))
    at = words.index("--eplb-config") + 1
    assert json.loads(words[at]) == {"step_interval": 9, "num_redundant_experts": 32}
    assert "--enable-eplb" in words
    key = "rollout.vllm.eplb_config"
    with refused(key, Cause.CONFLICT, "rollout.redundant_experts"):
        check_reserved(rollout(eplb_config={"num_redundant_experts": 1}), "rollout")


def test_one_key_is_set_on_the_command_line_too():
    config = parse_recipe({"rollout": {"vllm": {"kv_cache_dtype": "fp8", "max_logprobs": 3}}})
    assert config.rollout.vllm == {"kv_cache_dtype": "fp8", "max_logprobs": 3}


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("tensor_parallel_size", "rollout.tensor_parallel"),
        ("max-model-len", "rollout.max_model_len"),
        ("no_enable_prefix_caching", "shares its prompt"),
        ("data_parallel_rank", "the fleet chooses"),
        ("port", "the fleet chooses"),
        ("config", "under vllm"),
    ],
)
def test_what_the_recipe_or_the_fleet_sets_is_refused(name, setting):
    with refused(f"rollout.vllm.{name}", Cause.CONFLICT, setting):
        check_engines(parse_recipe({"rollout": {"vllm": {name: 1}}}), HF)


def test_a_teacher_has_a_setting_of_its_own():
    teacher = parse_recipe({"teacher": {"vllm": {"max_num_batched_tokens": 4}}}).teacher
    with refused(
        "teacher.vllm.max_num_batched_tokens", Cause.CONFLICT, "teacher.max_num_batched_tokens"
    ):
        check_reserved(teacher, "teacher")
    key = "teacher.by_source.code"
    arguments = "vllm.max_num_batched_tokens", f"set {key}.max_num_batched_tokens,"
    with refused(f"{key}.{arguments[0]}", Cause.CONFLICT, arguments[1]):
        check_reserved(teacher, key)
    teacher = parse_recipe({"teacher": {"vllm": {"dtype": "float16"}}}).teacher
    with refused(f"{key}.vllm.dtype", Cause.CONFLICT, f"set {key}.dtype,"):
        check_reserved(teacher, key)
    check_reserved(rollout(max_num_batched_tokens=4), "rollout")


def test_every_argument_that_engines_get_is_refused_in_a_recipe():
    """Else a recipe could contradict it without a word."""
    settings = [
        EngineSettings(device=device, speculative={"method": "ngram"}, secret="s", **options)
        for device in ("cpu", "cuda")
        for options in (
            {
                "return_routing": True,
                "enable_sleep_mode": True,
                "gpu_memory": 0.5,
                "kv_block_tokens": 32,
            },
            {"plain_matrices": True, "expert_parallel": True, "prefix_caching": False},
        )
    ]
    words = [word for each in settings for word in each.arguments(Path("model"))]
    names = {word[2:].replace("-", "_").removeprefix("no_") for word in words if word[:2] == "--"}
    assert {"model", "middleware", "enable_sleep_mode"} < names
    for name in names - FREE:
        with refused(f"rollout.vllm.{name}", Cause.CONFLICT):
            check_reserved(rollout(**{name: 1}), "rollout")


@pytest.mark.parametrize(
    ("vllm", "name", "cause", "shown"),
    [
        ({"kv_cache_dtyp": "fp8"}, "kv_cache_dtyp", Cause.UNKNOWN, "kv_cache_dtype"),
        ({"all2all": "naive"}, "all2all", Cause.UNKNOWN, "vLLM has no such"),
        ({"kv_cache_dtype": "fp9"}, "kv_cache_dtype", Cause.MALFORMED, "fp9"),
        ({"eplb_config": {"redundant": 3}}, "eplb_config", Cause.MALFORMED, "redundant"),
        ({"compilation_config": {"cudagraph_mode": "ALL"}}, "", Cause.MALFORMED, "knows no 'ALL'"),
    ],
)
@pytest.mark.more
def test_what_vllm_does_not_accept_is_refused_by_its_own_parser(vllm, name, cause, shown):
    """vLLM itself does not name the argument of a value that an enumeration lacks."""
    with refused(f"rollout.vllm.{name}".rstrip("."), cause, shown):
        check_arguments(rollout(max_num_batched_tokens=8192, **vllm), "rollout")


@pytest.mark.more  # imports the whole of vLLM
def test_vllm_reads_what_recipes_of_clusters_set():
    """And it has every name that is refused: a name that it has dropped would be no rule."""
    words = argument_list(
        {
            "kv_cache_dtype": "fp8",
            "all2all_backend": "deepep_low_latency",
            "compilation_config": {"cudagraph_mode": "FULL_AND_PIECEWISE"},
            "enable_chunked_prefill": True,
            "max_num_batched_tokens": 8192,
            "enable_eplb": True,
            "eplb_config": {"num_redundant_experts": 32},
        }
    )
    parsed = vllm_arguments._parse_with_vllm(words)
    assert parsed.error == ""
    assert {*RESERVED_ARGUMENTS, *FIXED_ARGUMENTS, *SERVER_ARGUMENTS} - set(parsed.names) == set()


def vllm_blocks(tree):
    """Return every `vllm:` of a recipe, in any section."""
    if not isinstance(tree, dict):
        return []
    inner = [block for value in tree.values() for block in vllm_blocks(value)]
    return [*([tree["vllm"]] if "vllm" in tree else []), *inner]


@pytest.mark.more  # 10 s for each block that differs
def test_vllm_accepts_what_the_recipes_of_real_size_set():
    found = [block for path in sorted(R1.glob("*.yaml")) for block in vllm_blocks(read_tree(path))]
    blocks = {json.dumps(block, sort_keys=True): block for block in found}
    assert blocks, f"no recipe of {R1} has arguments of vLLM"
    for block in blocks.values():
        check_arguments(rollout(**block), "rollout")
