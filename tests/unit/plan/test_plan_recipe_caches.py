"""Every shipped recipe with engines has room for what they cache."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from planned_jobs import ROOT, planned

from megatron_r1.config import Config, infer_verb, load_recipe
from megatron_r1.engines.server.model_config import max_model_len
from megatron_r1.models.hf_config_file import read_hf_config
from megatron_r1.plan.engine_memory import EngineMemory
from megatron_r1.plan.estimate import JobEstimate
from megatron_r1.plan.hardware import GIB, HARDWARE
from megatron_r1.plan.job import PlannedJob
from megatron_r1.plan.recipe_job import _gpus_of_hosts

BEYOND = 3 * GIB
"""What every engine must have besides the cache of four of its longest requests."""


def evaluates(config: Config) -> bool:
    """Whether the recipe only evaluates: engines alone, as those of a sample recipe."""
    return bool(config.eval.benchmarks) and not (config.data.path or config.data.task)


def engine_recipes() -> list[Path]:
    """The recipes of models that are shipped whose verb samples."""
    found = []
    for path in sorted((ROOT / "examples").rglob("*.yaml")):
        text = path.read_text()
        if "\nstages:" in text or "\nrollout:" not in text or "\nmodel:" not in text:
            continue
        config = load_recipe(path)
        has_model = (ROOT / config.model.path / "config.json").is_file()
        if has_model and (evaluates(config) or infer_verb(config) in ("rl", "sample")):
            found.append(path)
    return found


RECIPES = engine_recipes()


def parts(path: Path) -> list[PlannedJob]:
    """The job at each entry of a recipe's schedule."""
    loaded = load_recipe(path)
    jobs = []
    for _, config in loaded.schedule_parts():
        verb = "sample" if evaluates(config) else infer_verb(config)
        rollout, gpus = config.rollout, config.parallel.processes
        if verb == "sample":
            gpus = rollout.engines * rollout.tensor_parallel * rollout.data_parallel
        hf_config = read_hf_config(ROOT / config.model.path)
        hosts = _gpus_of_hosts(config, verb)
        job = PlannedJob(hf_config, config, gpus, HARDWARE["H800"], rollout_gpus=hosts, verb=verb)
        jobs.append(replace(job, keeps_reference=verb == "rl" and loaded.uses_reference))
    return jobs


def test_the_recipes_with_engines_are_found():
    names = {path.stem for path in RECIPES}
    assert {"r1_zero", "r1_zero_fp8", "r1_zero_pools", "evaluation", "qwen2.5-7b"} <= names
    assert len([path for path in RECIPES if path.parent.name == "deepseek_r1"]) == 10
    assert [len(parts(path)) for path in RECIPES if path.stem == "r1_zero"] == [2]


def test_a_gpu_of_an_engine_has_room_for_the_passes_of_all_data_ranks():
    """By hand: 16 x 1,024 tokens, each chosen by 8 experts, twice 7,168 values in bf16."""
    (first, _) = parts(ROOT / "examples/deepseek_r1/r1_zero.yaml")
    passes = EngineMemory(first).passes
    assert passes["workspace of experts"].value == 2 * (16 * 1024) * 8 * 7168 * 2
    assert "workspace_shapes of TRITON" in passes["workspace of experts"].formula
    assert passes["hidden states"].value == (16 + 5) * 1024 * 7168 * 2


def test_a_refusal_names_the_largest_passes_that_fit():
    def problems(tokens: int) -> list[str]:
        vllm = {"max_num_batched_tokens": tokens}
        settings = {"rollout__redundant_experts": 128, "rollout__vllm": vllm}
        return JobEstimate(planned(**settings)).problems()

    named = re.findall(
        r"max_num_batched_tokens of rollout.vllm to ([\d,]+)", "".join(problems(8192))
    )
    (tokens,) = {int(number.replace(",", "")) for number in named}  # of the cache and of the push
    assert len(named) == 2 and problems(tokens) == [] and problems(tokens + 1) != []


def test_experts_of_a_named_backend_are_those_that_are_planned():
    (job,) = parts(ROOT / "examples/deepseek_r1/r1_zero_fp8.yaml")[:1]
    formulas = {}
    for backend in ("auto", "deep_gemm", "triton", "marlin"):
        vllm = job.config.rollout.vllm | {"moe_backend": backend}
        rollout = job.config.rollout.model_copy(update={"vllm": vllm})
        config = job.config.model_copy(update={"rollout": rollout})
        passes = EngineMemory(replace(job, config=config)).passes
        formulas[backend] = passes["workspace of experts"].formula
    assert "of DEEPGEMM" in formulas["deep_gemm"] and "of TRITON" in formulas["triton"]
    doubted = {name for name, text in formulas.items() if text.startswith("not asked")}
    assert doubted == {"auto", "marlin"}


@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
def test_four_of_the_longest_requests_and_more_have_cache(path):
    for job in parts(path):
        estimate = JobEstimate(job)
        engines = estimate.engines
        needed = 4 * max_model_len(job.config) * engines.token_bytes + BEYOND
        assert engines.cache_bytes >= needed, (engines.cache_bytes / GIB, needed / GIB)
        assert not [part for part in engines.passes.values() if part.value is None]
        assert estimate.problems() == []
