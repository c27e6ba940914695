"""The patches of Megatron-Core: their upstream lines, and that no model is built without them."""

import subprocess
import sys

import pytest
import upstream

from megatron_r1.models import patches

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
