"""Every patch of Megatron-Core that the models here need, on a CPU and on a GPU.

The functions that take the place of Megatron's are in `expert_routing`, `packed_rotary`,
`packed_roll` and `token_dispatcher`.

`install` replaces names of Megatron's modules for the whole process. Who starts a process that
builds models calls it once, after `platform.prepare_process()`, whose own patches are for a CPU
only (`models.cpu_patches`): trainer ranks do in `trainer.distributed.initialize`. `build_model`
refuses to build before, as the model would compute something else without an error. A patch's
upstream line is the one that is wrong, or too slow; tests/unit/models/test_patches.py fails when it
is gone. What concerns one layer is no patch but a subclass that the layer specs choose
(`models.layers`); parameters' marks are corrected in `models.gradients`."""

from typing import Any

import torch
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.tensor_parallel import layers, random
from megatron.core.transformer import multi_latent_attention, multi_token_prediction
from megatron.core.transformer.mla_qk_norm_config import QKNormConfigResolver
from megatron.core.transformer.moe import moe_layer, router, token_dispatcher

from megatron_r1.models.expert_routing import route_tokens
from megatron_r1.models.packed_roll import roll_packed
from megatron_r1.models.packed_rotary import rotate_packed
from megatron_r1.models.patch_type import Patch, register_in
from megatron_r1.models.token_dispatcher import KnownCountsDispatcher, indices_to_multihot

PATCHES: list[Patch] = []
_patch = register_in(PATCHES)
_installed = False


def install() -> None:
    """Install all patches; a second call has no effect."""
    global _installed
    if not _installed:
        for patch in PATCHES:
            patch.install()
        _installed = True


def check_installed() -> None:
    """Raise RuntimeError where `install` has not been called in this process."""
    if not _installed:
        raise RuntimeError(
            "models are built from a patched Megatron-Core: call megatron_r1.models.patches."
            "install() once in this process, after megatron_r1.models.platform.prepare_process()"
        )


@_patch(
    "groups of experts are scored by their best topk / group_topk, not as the models define it",
    "transformer/moe/moe_utils.py:group_limited_topk",
    "topk // group_topk",
)
def _patch_routing() -> None:
    # Without it tokens go to other experts than in transformers and vLLM, without an error.
    router.topk_routing_with_score_function = route_tokens


@_patch(
    "rotary angles of a packed batch are sliced sample by sample, and know no shared prefixes",
    "models/common/embeddings/rope_utils.py:_apply_rotary_pos_emb_thd",
    "for x in sequence_splits",
)
def _patch_rotary_angles() -> None:
    rope_utils._apply_rotary_pos_emb_thd = rotate_packed


@_patch(
    "tokens of MTP layers are shifted sample by sample, and the host waits for each border",
    "transformer/multi_token_prediction.py:_roll_tensor_packed_seq",
    "start_idx = cu_seqlens[i]",
)
def _patch_shifted_tokens() -> None:
    multi_token_prediction._roll_tensor_packed_seq = roll_packed


@_patch(
    "the host waits in every layer for counts of tokens that it knows",
    "transformer/moe/token_dispatcher.py:MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize",
    "self.d2h_event.synchronize()",
)
def _patch_known_counts() -> None:
    moe_layer.MoEAlltoAllTokenDispatcher = KnownCountsDispatcher


@_patch(
    "tokens that DeepEP brings are selected by masks, and the host waits for the masks' counts",
    "transformer/moe/token_dispatcher.py:_DeepepManager._indices_to_multihot",
    "indices[mask]",
)
def _patch_multihot() -> None:
    token_dispatcher._DeepepManager._indices_to_multihot = indices_to_multihot


@_patch(
    "gradient_accumulation_fusion requires Apex's kernel of the output layer",
    "tensor_parallel/layers.py:ColumnParallelLinear.__init__",
    "not _grad_accum_fusion_available",
)
def _allow_fused_gradients_without_apex() -> None:
    # Safe: only the output layer's product uses Apex's kernel, and `LMHead` has no product. The
    # other layers with fused gradients are Transformer Engine's, with a kernel of their own.
    layers._grad_accum_fusion_available = True


@_patch(
    "each rank compiles, in the home folder and behind a lock file, what refills freed storages",
    "tensor_parallel/random.py:_get_share_storage",
    "load_inline(",
)
def _patch_refilled_storages() -> None:
    # A rank killed while it compiles leaves the lock, on which all later ranks wait forever.
    def refill(output: torch.Tensor, recomputed: torch.Tensor) -> None:
        source = recomputed.untyped_storage()
        output.untyped_storage().resize_(source.nbytes())
        output.untyped_storage().copy_(source)

    random._get_share_storage = lambda: refill


@_patch(
    "latent attention gives queries that are not compressed a norm, which no model has",
    "transformer/mla_qk_norm_config.py:QKNormConfigResolver._resolve_mla_qk_layernorm",
    "self.submodules.linear_q_proj",
)
def _patch_query_norm() -> None:
    resolve = QKNormConfigResolver.resolve

    def with_plain_queries(self: QKNormConfigResolver) -> dict[str, Any]:
        projection = self.submodules.linear_q_proj or self.linear_impl
        if self.has_q_lora:
            return resolve(self)
        self.has_q_lora = True  # as if: the norm of compressed queries is not built without them
        return resolve(self) | {"linear_q_proj": projection}

    QKNormConfigResolver.resolve = with_plain_queries


@_patch(
    "values of latent attention are padded to the width of keys, from 128 to 192",
    "transformer/multi_latent_attention.py:_prepare_mla_core_attention_value",
    "F.pad(value",
)
def _patch_padded_values() -> None:
    # Both widths are given: Transformer Engine has fused attention for them (docs/gpu.md).
    multi_latent_attention._prepare_mla_core_attention_value = (
        lambda attention, query, value, packed_seq_params: (value, False, None, None)
    )
