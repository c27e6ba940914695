"""Whether the trainer computes on GPUs what it does on a CPU in fp32: the recipe's miniature in its
own dtype, with packed batches and latent attention.

What is compared: log-probabilities before and after an update, and the gradients' norm. The CPU's
are carried in expected_steps.json, by a hash of their settings;

    python tests/gpu/trainer_layers.py

computes them again, in a minute. Tests compare the CPU's path with transformers."""

import hashlib
import json
import re
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
from gpu_miniatures import check_fp8, device_kind, num_gpus, recipe_miniature, with_settings
from processes import output_of
from safetensors.torch import load_file, save_file

from megatron_r1.base.processes.children import free_port, rank_variables
from megatron_r1.config import Config, dump_recipe
from megatron_r1.models.attention_choice import why_not
from megatron_r1.rehearse import model

HERE = Path(__file__).parent
EXPECTED = HERE / "expected_steps.json"
ONE = {"tensor": 1, "context": 1, "expert": 1, "pipeline": 1, "virtual_pipeline": 1}
CASES: dict[str, dict[str, int]] = {
    "one": {},
    "fp8": {},
    "context": {"context": 2},
    "experts": {"tensor": 2, "expert": 2},
    "grid": {"tensor": 2, "expert": 2, "pipeline": 2, "virtual_pipeline": 2},
    "whole": {"tensor": 2, "context": 2, "expert": 2, "pipeline": 2, "virtual_pipeline": 2},
}
"""Layouts: axes that are divided."""
TOKENS = 512
"""Of a micro-batch: several samples in each, and several of them."""


class LayerLimits(NamedTuple):
    """The most of the mean difference of log-probabilities (at most `trainer_steps.FAR_DIFFERENCE`
    for a token), and the least cosine between the changes by an update, here and on the CPU. A CPU
    in bf16 has 0.025 and 0.94, with FP8 emulated on both sides 0.12 and 0.82; other weights 0.2
    and 0."""

    gap: float
    cosine: float


LIMITS = {"fp8": LayerLimits(0.15, 0.7)}
BF16 = LayerLimits(0.05, 0.85)
MAX_NORM = 0.05
"""The largest difference of the gradients' norms, as a share."""
UNFUSED_ATTENTION = "UnfusedDotProductAttention"
"""Transformer Engine's attention that holds a matrix of all pairs of tokens."""


def settings(case: str, folder: Path) -> tuple[Config, Config, dict]:
    """The configurations of the ranks and of the CPU, and the model's config.json."""
    small = recipe_miniature(folder, max_ranks=8)
    axes = ONE | CASES[case]
    layout = small.config.parallel.pipeline_layout if axes["pipeline"] > 1 else None
    ranks = axes["tensor"] * axes["context"] * axes["pipeline"]
    on_cpu = device_kind() == "cpu"
    parallel = axes | {"processes": ranks, "pipeline_layout": layout, "threads": 1}
    parallel["tokens_per_microbatch"] = TOKENS
    # Smooth in the gradient: with a small epsilon Adam's first step is its sign.
    optimizer = {"epsilon": 1.0, "warmup_updates": 0, "weight_decay": 0.0}
    shared_sections = {
        # Samples have the CPU's log-probabilities: a weight by their ratio would be 1 there only.
        "rl": {"importance_cap": None},
        "optimizer": optimizer,
        "fp8": {"recipe": "blockwise" if case == "fp8" else "none"},
    }
    # The recipe's `fused` would end the ranks without the reason that Transformer Engine logs.
    model_settings = {"attention_backend": "auto"} | ({"fusions": []} if on_cpu else {})
    ranks_config = with_settings(
        small.config, parallel=parallel, model=model_settings, **shared_sections
    )
    one_rank = parallel | ONE | {"processes": 1, "pipeline_layout": None}
    fp32_model = {"dtype": "float32", "attention_backend": "auto", "fusions": []}
    cpu_config = with_settings(small.config, parallel=one_rank, model=fp32_model, **shared_sections)
    return ranks_config, cpu_config, small.hf_config


def write_model(config: Config, hf_config: dict) -> None:
    """Write random weights that bf16 holds exactly, so that both sides start from the same ones."""
    folder = Path(config.model.path)
    model.write_random_model_folder(folder, hf_config, seed=0)
    file = folder / "model.safetensors"
    tensors = {name: tensor.bfloat16().float() for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def key_of(config: Config, hf_config: dict) -> str:
    """What the CPU's results depend on: its settings, its model and the steps."""
    sections = config.model_dump(include={"parallel", "optimizer", "fp8", "rl"})
    sections |= {"model": config.model.model_dump(exclude={"path"}), "hf_config": hf_config}
    text = json.dumps(sections, sort_keys=True, default=str)
    text += (HERE / "trainer_steps.py").read_text()
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def run_ranks(config: Config, expected: Path, results: Path, **variables: str) -> str:
    """Run the steps on the ranks of a configuration, and return their output."""
    recipe = results.with_suffix(".yaml")
    recipe.write_text(dump_recipe(config))
    arguments = [str(HERE / "trainer_steps.py"), str(recipe), str(expected), str(results)]
    ranks = config.parallel.processes
    if ranks == 1:
        variables |= rank_variables(0, 1, free_port("127.0.0.1"))
    else:
        torchrun = ["--standalone", f"--nproc-per-node={ranks}", f"--log-dir={results.parent}/logs"]
        arguments = ["-m", "torch.distributed.run", *torchrun, *arguments]
    return output_of(arguments, "a rank", **variables)


def carry_expected() -> None:
    """Write the results of the CPU for all cases."""
    found = {}
    for case in ("one", "fp8"):
        with tempfile.TemporaryDirectory() as folder:
            _, config, hf_config = settings(case, Path(folder))
            write_model(config, hf_config)
            results = Path(folder) / "expected.json"
            run_ranks(config, Path(folder) / "none", results, CUDA_VISIBLE_DEVICES="")
            found[key_of(config, hf_config)] = json.loads(results.read_text())
    EXPECTED.write_text(json.dumps(found) + "\n")


def find_expected(config: Config, hf_config: dict) -> dict:
    """The carried results of the CPU."""
    found = json.loads(EXPECTED.read_text()).get(key_of(config, hf_config))
    assert found, f"{EXPECTED.name} is of other settings: python tests/gpu/trainer_layers.py"
    return found


def judge(measured, expected, limits: LayerLimits) -> None:
    """Fail where a difference exceeds its limit."""
    norm, expected_norm = measured["update"]["grad_norm"], expected["update"]["grad_norm"]
    assert measured["after"]["moved"] > 0.2, "the update moves nothing: there is nothing to compare"
    gap, cosine = measured["before"]["gap"], measured["after"]["cosine"]
    assert gap <= limits.gap, f"log-probabilities differ by {gap:.3g} nats, at most {limits.gap}"
    assert abs(norm / expected_norm - 1) <= MAX_NORM, f"norm {norm:.4g}, on a CPU {expected_norm}"
    assert cosine >= limits.cosine, f"an update goes elsewhere than on a CPU: cosine {cosine:.3g}"


def logged_backends(output: str) -> str:
    """The attention backends that Transformer Engine has logged."""
    matches = re.findall(r"Running with (\w+)\b(?!=)(?: backend)?( \([^)]*\))?", output)
    return ", ".join(sorted({name + details for name, details in matches}))


def compare(case: str, folder: Path, record_figures) -> None:
    """Run a case on GPUs, or where there are none on CPU ranks, and compare."""
    if case == "fp8":
        check_fp8()
    ranks_config, cpu_config, hf_config = settings(case, folder)
    ranks = ranks_config.parallel.processes
    if device_kind() != "cpu" and num_gpus() < ranks:
        pytest.skip(f"it needs {ranks} GPUs, and {num_gpus()} are here")
    expected = find_expected(cpu_config, hf_config)
    write_model(ranks_config, hf_config)
    file, results = folder / "expected.json", folder / "here.json"
    file.write_text(json.dumps(expected))
    output = run_ranks(ranks_config, file, results, NVTE_DEBUG="1", NVTE_DEBUG_LEVEL="2")
    measured, backend = json.loads(results.read_text()), logged_backends(output)
    figures = {
        "logprob_diff": measured["before"]["gap"],
        "after an update": measured["after"]["gap"],
        "moved by it": measured["after"]["moved"],
        "cosine with the CPU's move": measured["after"]["cosine"],
        "gradient norm, of the CPU's": measured["update"]["grad_norm"]
        / expected["update"]["grad_norm"],
        "attention": f"{measured['parts']['attention']} {backend}".strip(),
    }
    record_figures(figures)
    judge(measured, expected, LIMITS.get(case, BF16))
    reason = why_not("FusedAttention", output.splitlines())
    assert UNFUSED_ATTENTION not in backend, f"{UNFUSED_ATTENTION}: {reason}"


if __name__ == "__main__":
    carry_expected()
