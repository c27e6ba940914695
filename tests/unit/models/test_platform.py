import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest
import upstream
from refusals import refused

from megatron_r1.base.errors import Cause
from megatron_r1.models import cpu_patches, platform


@pytest.mark.parametrize("patch", cpu_patches.PATCHES, ids=lambda patch: patch.name)
def test_the_upstream_line_that_needs_the_patch_is_still_there(patch):
    upstream.check(patch)


def test_the_pinned_megatron_is_installed():
    assert importlib.metadata.version("megatron-core") == platform.MEGATRON_VERSION


PROGRAM = """
import torch
before = (torch.zeros, torch.Tensor.to, torch.cuda.current_device, torch.Tensor.type)
from megatron_r1.models import platform
assert before == (torch.zeros, torch.Tensor.to, torch.cuda.current_device, torch.Tensor.type)
platform.prepare_process()
assert torch.zeros(2, device="cuda").device == platform.CPU_DEVICE
assert torch.ones(2).cuda().to("cuda").type() == "torch.cuda.FloatTensor"
torch.cuda.manual_seed(3); state = torch.cuda.get_rng_state(); a = torch.rand(4)
torch.cuda.set_rng_state(state); assert torch.equal(a, torch.rand(4))
with torch.cuda.stream(torch.cuda.Stream()): torch.cuda.synchronize()
with torch.device("meta"): assert torch.arange(2).is_meta and torch.empty(2).is_meta
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.jit import jit_fuser
import megatron.core.fusions.fused_bias_swiglu as f
assert torch.allclose(f.swiglu(torch.ones(1, 4)), torch.nn.functional.silu(torch.ones(1, 2)))
"""


@pytest.mark.more
@pytest.mark.skipif(platform.has_gpu(), reason="there is a GPU: CUDA_VISIBLE_DEVICES='' pytest")
def test_an_import_patches_nothing_and_prepare_lets_cuda_habits_run_on_the_cpu():
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture
def a_gpu(monkeypatch, tmp_path):
    """A machine with a GPU whose Transformer Engine is the file returned."""
    monkeypatch.setattr(platform, "_REAL_CUDA", True)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.startswith("transformer_engine")]:
        monkeypatch.delitem(sys.modules, name)  # another test's
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text("")
    yield package / "pytorch.py"
    for name in [name for name in sys.modules if name.startswith("transformer_engine")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("module", "shown"),
    [
        ("import no_such_module", "no_such_module"),
        ("raise OSError('libcudart.so.13: cannot open shared object file')", "libcudart.so.13"),
    ],
)
def test_a_gpu_without_a_working_transformer_engine_is_an_error(a_gpu, module, shown):
    a_gpu.write_text(module)
    with refused("transformer_engine", Cause.NOT_INSTALLED, shown):
        platform.uses_transformer_engine()


def test_a_gpu_with_transformer_engine_uses_it(a_gpu):
    a_gpu.write_text("")
    assert platform.uses_transformer_engine()


def test_another_megatron_is_an_error_that_names_both_versions(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.19.0")
    with refused("megatron-core", Cause.CONFLICT, "0.19.0", platform.MEGATRON_VERSION):
        platform.prepare_process()


@pytest.mark.parametrize(("found", "warns"), [("2.11.0", True), ("2.20.2+cu13.abc", False)])
def test_another_transformer_engine_is_named(monkeypatch, recwarn, found, warns):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: found)
    platform.warn_of_transformer_engine()
    messages = [str(each.message) for each in recwarn]
    assert any(f"transformer-engine {found}" in text for text in messages) == warns


def test_the_lock_for_gpus_has_the_versions_that_are_checked():
    lock = (Path(__file__).parents[3] / "requirements" / "cuda.lock").read_text().splitlines()
    assert f"megatron-core=={platform.MEGATRON_VERSION}" in lock
    assert f"transformer-engine=={platform.TRANSFORMER_ENGINE_VERSION}" in lock
