"""Whether the trainer computes on GPUs what it does on a CPU in fp32: the recipe's miniature in its
own dtype, with packed batches and latent attention.

`python -m tools.gpu_check.layers CASE FOLDER`; a case is a parallel layout, or FP8. What is
compared: log-probabilities before and after an update, and the gradients' norm. Tests compare the
CPU's path with transformers."""

import json
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file, save_file

from megatron_r1.base.processes.children import free_port, rank_variables
from megatron_r1.config import Config, dump_recipe
from megatron_r1.models.hf_config import HFConfig
from megatron_r1.rehearse import model
from tools.gpu_check import verdict
from tools.gpu_check.miniatures import (
    check_fp8,
    device_kind,
    num_gpus,
    recipe_miniature,
    with_settings,
)
from tools.gpu_check.verdict import CheckFailed, Impossible, output_of

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
    """What a layer must hold.

    Attributes:
        gap: the most of the mean difference of log-probabilities (at most
            `trainer_steps.FAR_DIFFERENCE` for a token).
        cosine: the least between the changes by an update, here and on the CPU. A CPU in bf16 has
            0.025 and 0.94, with FP8 emulated on both sides 0.12 and 0.82; other weights 0.2 and 0.
    """

    gap: float
    cosine: float


LIMITS = {"fp8": LayerLimits(0.15, 0.7)}
BF16 = LayerLimits(0.05, 0.85)
MAX_NORM = 0.05
"""The largest difference of the gradients' norms, as a share."""
UNFUSED_ATTENTION = "UnfusedDotProductAttention"
"""Transformer Engine's attention that holds a matrix of all pairs of tokens."""


def settings(case: str, folder: Path) -> tuple[Config, Config]:
    """Write the miniature's model, and return the configurations of the ranks and of the CPU."""
    small = recipe_miniature(folder, max_ranks=8)
    _write_model(Path(small.config.model.path), small.hf_config)
    axes = ONE | CASES[case]
    layout = small.config.parallel.pipeline_layout if axes["pipeline"] > 1 else None
    ranks = axes["tensor"] * axes["context"] * axes["pipeline"]
    on_cpu = device_kind() == "cpu"
    parallel = axes | {"processes": ranks, "pipeline_layout": layout, "threads": 1}
    parallel["tokens_per_microbatch"] = TOKENS
    # Smooth in the gradient: with a small epsilon Adam's first step is its sign.
    optimizer = {"epsilon": 1.0, "warmup_updates": 0, "weight_decay": 0.0}
    shared_sections: dict[str, dict[str, Any]] = {
        # Samples have the CPU's log-probabilities: a weight by their ratio would be 1 there only.
        "rl": {"importance_cap": None},
        "optimizer": optimizer,
        "fp8": {"recipe": "blockwise" if case == "fp8" else "none"},
    }
    # The recipe's `fused` would end the ranks without the reason that Transformer Engine logs.
    model_settings: dict[str, Any] = {"attention_backend": "auto"}
    if on_cpu:
        model_settings["fusions"] = []
    ranks_config = with_settings(
        small.config, parallel=parallel, model=model_settings, **shared_sections
    )
    one_rank = parallel | ONE | {"processes": 1, "pipeline_layout": None}
    fp32_model = {"dtype": "float32", "attention_backend": "auto", "fusions": []}
    return ranks_config, with_settings(
        small.config, parallel=one_rank, model=fp32_model, **shared_sections
    )


def _write_model(folder: Path, hf_config: HFConfig) -> None:
    """Write random weights that bf16 holds exactly, so that both sides start from the same ones."""
    model.write_random_model_folder(folder, hf_config, seed=0)
    file = folder / "model.safetensors"
    tensors = {name: tensor.bfloat16().float() for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def run_ranks(recipe: Path, folder: Path, ranks: int, **variables: str) -> str:
    """Run the steps on so many ranks; return their output.

    Args:
        recipe: the recipe's file.
        folder: the folder of the run.
        ranks: how many.
        **variables: further environment variables.

    Raises:
        CheckFailed: a rank fails; the message has the end of its output."""
    arguments = ["-m", "tools.gpu_check.trainer_steps", str(recipe), str(folder)]
    if ranks == 1:
        variables |= rank_variables(0, 1, free_port("127.0.0.1"))
    else:
        torchrun = ["--standalone", f"--nproc-per-node={ranks}", f"--log-dir={folder}/logs"]
        arguments = ["-m", "torch.distributed.run", *torchrun, *arguments]
    return output_of(arguments, f"{recipe.stem}: a rank", **variables)


def evaluate(
    measured: Mapping[str, Any],
    expected: Mapping[str, Any],
    backend: str,
    limits: LayerLimits = BF16,
    unfused_reason: str = "",
) -> dict[str, Any]:
    """Return the figures of a comparison.

    Args:
        measured: the results of `trainer_steps`.
        expected: the results of `trainer_steps`.
        backend: Transformer Engine's name of its attention.
        limits: the largest differences that pass.
        unfused_reason: its reason not to take cuDNN's.

    Raises:
        CheckFailed: a difference exceeds its limit, or attention was not a fused one.
    """
    norm, expected_norm = measured["update"]["grad_norm"], expected["update"]["grad_norm"]
    figures = {
        "logprob_diff": measured["before"]["gap"],
        "after an update": measured["after"]["gap"],
        "moved by it": measured["after"]["moved"],
        "cosine with the CPU's move": measured["after"]["cosine"],
        "gradient norm, of the CPU's": norm / expected_norm,
        "attention": f"{measured['parts']['attention']} {backend}".strip(),
    }
    assert measured["after"]["moved"] > 0.2, "the update moves nothing: there is nothing to compare"
    if not measured["before"]["gap"] <= limits.gap:
        gap = measured["before"]["gap"]
        raise CheckFailed(
            f"log-probabilities differ by {gap:.3g} nats, at most {limits.gap}", **figures
        )
    if not abs(norm / expected_norm - 1) <= MAX_NORM:
        raise CheckFailed(
            f"the gradients' norm is {norm:.4g}, on a CPU {expected_norm:.4g}", **figures
        )
    if not measured["after"]["cosine"] >= limits.cosine:
        cosine = measured["after"]["cosine"]
        raise CheckFailed(f"an update goes elsewhere than on a CPU: cosine {cosine:.3g}", **figures)
    if UNFUSED_ATTENTION in backend:
        reason = f": {unfused_reason}" if unfused_reason else ""
        raise CheckFailed(
            f"Transformer Engine chose {UNFUSED_ATTENTION} for packed batches{reason}", **figures
        )
    return figures


def _logged_backends(output: str) -> str:
    """Return the attention backends that Transformer Engine has logged."""
    matches = re.findall(r"Running with (\w+)\b(?!=)(?: backend)?( \([^)]*\))?", output)
    return ", ".join(sorted({name + details for name, details in matches}))


def _why_not_fused(output: str) -> str:
    """Return the reasons that Transformer Engine has logged for not taking cuDNN's attention."""
    reasons = re.findall(r"Disabling FusedAttention (?:as|for|due to|because) (.+)", output)
    return "; ".join(dict.fromkeys(reason.strip() for reason in reasons))


def check(case: str, folder: Path) -> dict[str, Any]:
    """Run a case on GPUs, or where there are none on CPU ranks, and compare."""
    axes = ONE | CASES[case]
    ranks = axes["tensor"] * axes["context"] * axes["pipeline"]
    if device_kind() != "cpu" and num_gpus() < ranks:
        raise Impossible(f"it needs {ranks} GPUs, and {num_gpus()} are here")
    if case == "fp8":
        check_fp8()
    folder = folder / f"layers-{case}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    ranks_config, cpu_config = settings(case, folder)
    cpu_recipe, ranks_recipe = folder / "on_cpu.yaml", folder / "here.yaml"
    cpu_recipe.write_text(dump_recipe(cpu_config))
    ranks_recipe.write_text(dump_recipe(ranks_config))
    run_ranks(cpu_recipe, folder, 1, CUDA_VISIBLE_DEVICES="")
    output = run_ranks(ranks_recipe, folder, ranks, NVTE_DEBUG="1", NVTE_DEBUG_LEVEL="2")
    measured, expected = (
        json.loads((folder / name).read_text()) for name in ("here.json", "expected.json")
    )
    limits = LIMITS.get(case, BF16)
    return evaluate(measured, expected, _logged_backends(output), limits, _why_not_fused(output))


if __name__ == "__main__":
    sys.exit(verdict.run(lambda: check(sys.argv[1], Path(sys.argv[2]))))
