"""The patches of Megatron-Core: their upstream lines, and that no model is built without them."""

import subprocess
import sys

import pytest
import torch
import upstream

from megatron_r1.models import patches, platform

platform.prepare_process()

from megatron.core.tensor_parallel import random  # noqa: E402

PROGRAM = """
from megatron_r1.models import platform
platform.prepare_process()
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.tensor_parallel import layers
from megatron.core.transformer.moe import router

from megatron_r1.models import build_model, patches
from megatron_r1.models.expert_routing import route_tokens
from megatron_r1.models.packed_rotary import rotate_packed

def replaced():
    return (
        rope_utils._apply_rotary_pos_emb_thd is rotate_packed,
        router.topk_routing_with_score_function is route_tokens,
        layers._grad_accum_fusion_available,
    )

try:
    build_model({}, None)
except RuntimeError as error:
    assert "patches.install()" in str(error), error
else:
    raise AssertionError("a model is built without the patches")
assert replaced() == (False, False, False), "importing the models patches nothing"
for _ in range(2):
    patches.install()
    patches.check_installed()
    assert replaced() == (True, True, True)
"""


@pytest.mark.parametrize("patch", patches.PATCHES, ids=lambda patch: patch.name)
def test_the_upstream_line_that_needs_the_patch_is_still_there(patch):
    upstream.check(patch)


@pytest.mark.more
def test_no_model_is_built_before_the_patches_are_installed():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_an_output_is_recomputed_without_a_compiler(monkeypatch, tmp_path):
    """A lock that a killed process left in the folder of compiled extensions stops nobody."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "share_storage_ext").mkdir()
    (tmp_path / "share_storage_ext/lock").touch()
    monkeypatch.setattr(random, "_get_share_storage", random._get_share_storage)
    next(p for p in patches.PATCHES if "_get_share_storage" in p.upstream).install()

    x = torch.randn(4, 6, requires_grad=True)
    checkpoint = random.CheckpointWithoutOutput()
    output = checkpoint.checkpoint(torch.sin, x)
    squared = output.view(24)[3:].square()  # autograd keeps a view of the output
    hooked = squared * 1
    checkpoint.discard_output_and_register_recompute(hooked)
    assert output.untyped_storage().nbytes() == 0
    hooked.sum().backward()
    expected = torch.sin(2 * x.detach())
    expected.view(-1)[:3] = 0
    torch.testing.assert_close(x.grad, expected)
