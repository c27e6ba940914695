"""Transformer Engine's choice of attention, with its own filters, its extension and the installed
cuDNN's heuristics: for every shipped recipe, and in installations that are broken."""

import json
import struct
import subprocess
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest
from nullgpu.conftest import TORCHRUN
from small_models import MODELS

HIDE = r"""
// Hides a library from cuDNN alone.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
void *dlopen(const char *name, int mode) {
    void *(*installed)(const char *, int) = dlsym(RTLD_NEXT, "dlopen");
    Dl_info caller;
    if (name && strstr(name, getenv("HIDDEN")) && dladdr(__builtin_return_address(0), &caller) &&
        strstr(caller.dli_fname, "libcudnn"))
        name = "libhidden.so";
    return installed(name, mode);
}
"""
UNASKED = ("agents/base", "agents/lookup", "laptop/r1_zero", "smollm2/rl")
CUDNN = Path(find_spec("torch").origin).parents[1] / "nvidia" / "cudnn" / "lib"


def rows_of(output):
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


@pytest.mark.parametrize(("device", "architecture"), [("h200", "sm90"), ("b200", "sm100")])
def test_every_recipe_in_bf16_gets_cudnns_attention(on_null_gpu, device, architecture):
    rows = rows_of(on_null_gpu("attention_of_recipes.py", device=device))
    print()
    for row in rows:
        choices = [choice.split(" ")[0] for choice in row.get("choices", [row.get("dtype")])]
        layout, longest = row.get("layout", ""), row.get("longest", "")
        print(f"{row['recipe']:40} {layout:10} {longest:6} {architecture:5} {'/'.join(choices)}")
    recipes = {row["recipe"]: row for row in rows}
    assert len(recipes) >= 24
    # Of these the model is made by a run; in fp32 there is no other attention than plain products.
    unasked = {name for name, row in recipes.items() if "answer" not in row}
    assert unasked == {f"{name}.yaml" for name in UNASKED}
    assert {recipes[name]["dtype"] for name in unasked} == {"float32"}
    assert recipes["laptop/base.yaml"]["answer"].startswith("unfused (for unsupported qkv_dtype")
    for name, row in recipes.items():
        if name not in unasked | {"laptop/base.yaml"} and "gpt-oss" not in name:
            assert (row["answer"], set(row["choices"])) == ("fused", {"fused"}), row
    for backend in ("auto", "fused"):
        answer = recipes[f"gpt-oss {backend}"]["answer"]
        assert "Known cuDNN < 9.26.0 issue with THD learnable softmax backward" in answer, answer
        assert f"model.attention_backend: {backend} has no fused attention" in answer
        assert f"({CUDNN}/libcudnn.so.9)" in answer and "libnvrtc.so.13)" in answer
    assert recipes["gpt-oss unfused"]["answer"] == "unfused (due to NVTE_FUSED_ATTN=0)"


@pytest.mark.parametrize(
    ("name", "grid", "shares"),
    [
        ("deepseek-yarn-mtp", "one", "shared"),
        ("gpt-oss", "one", "apart"),
        ("qwen-untied", "cp2", "apart"),
        ("qwen-untied", "tp2", "shared"),
    ],
)
def test_the_parameters_are_those_that_attention_hands_over(
    on_null_gpu, tmp_path, name, grid, shares
):
    (tmp_path / "config.json").write_text(json.dumps(MODELS[name]))
    gpus = 1 if grid == "one" else 2
    script = [f"--nproc-per-node={gpus}", "attention_handed_over.py", str(tmp_path), grid, shares]
    assert f"{grid} {shares}: as handed over, " in on_null_gpu(*TORCHRUN, *script, gpus=gpus)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("libnvrtc", "Could not open libnvrtc"),
        ("libcuda.so", "libcuda == nullptr"),
        ("two versions", "CUDNN_STATUS_SUBLIBRARY_VERSION_MISMATCH"),
    ],
)
def test_a_broken_installation_is_named(on_null_gpu, tmp_path, fault, reason):
    library, variables = tmp_path / "hide.so", {"HIDDEN": fault}
    if fault == "two versions":
        # A graph library that says to be of another version, in front of the installed one.
        library = tmp_path / "libcudnn_graph.so.9"
        major, minor, patch = map(int, metadata.version("nvidia-cudnn-cu13").split(".")[:3])
        number = 10_000 * major + 100 * minor + patch
        code = (CUDNN / library.name).read_bytes()
        library.write_bytes(code.replace(struct.pack("<I", number), struct.pack("<I", number - 1)))
    else:
        command = ["cc", "-O2", "-shared", "-fPIC", "-x", "c", "-", "-o", library, "-ldl"]
        subprocess.run(command, input=HIDE, text=True, check=True)
    rows = rows_of(on_null_gpu("attention_of_recipes.py", preload=library, **variables))
    answer = next(row["answer"] for row in rows if row["recipe"] == "deepseek_r1/r1_zero.yaml")
    assert reason in answer and "fused has no fused attention on this GPU" in answer, answer
    assert len(answer) < 1200
    assert (str(library) in answer) == (fault == "two versions")
