"""Every patch of Megatron-Core that the models here need, on a CPU and on a GPU, with the functions
that take the place of Megatron's.

`install` replaces names of Megatron's modules for the whole process. Who starts a process that
builds models calls it once, after `platform.prepare()`, whose own patches are for a CPU only
(`models.cpu_patches`): trainer ranks do in `trainer.distributed.initialize`. `build_model` refuses
to build before, as the model would compute something else without an error. A patch's upstream
line is the one that is wrong, or too slow; tests/unit/models/test_patches.py fails when it is
gone. What concerns one layer is no patch but a subclass that the layer specs choose
(`models.layers`); parameters' marks are corrected in `models.gradients`.

`rotate_packed`: Megatron slices the rotary angles of a packed batch sample by sample, in Python,
for queries and keys of every layer: with 256 samples that is a third of a small model's time
besides its products, and on a GPU a synchronization each time. Here all angles are gathered in one
operation, at the positions that `packed_params` has for the whole micro-batch.

`roll_packed`: the same of MTP layers' tokens.

`_route`: Megatron scores a group of experts by its best topk / group_topk, where DeepSeek-V3 and
its descendants take the best two and DeepSeek-V2 the best one: with any other ratio tokens would
silently be routed differently. And with sigmoid it always normalizes the chosen scores, except for
one expert, which it never does (moe_utils.py:724, Megatron-Core 0.16.1)."""

import functools
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.extensions import transformer_engine
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import layers
from megatron.core.transformer import multi_token_prediction
from megatron.core.transformer.moe import moe_layer, router, token_dispatcher
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_r1.models.context_parallel import positions_of_rank
from megatron_r1.models.experts import GROUP_SCORES
from megatron_r1.models.packed_params import marked_positions
from megatron_r1.models.patching import Patch, register_in
from megatron_r1.models.shared_prefixes import marked_prefixes
from megatron_r1.models.token_dispatcher import KnownCountsDispatcher, indices_to_multihot


def sample_positions(cu_seqlens: Tensor, rank: int = 0, num_ranks: int = 1) -> Tensor:
    """Return the position in its sample of each token that a context-parallel rank holds, (T /
    num_ranks,) int64.

    Args:
        cu_seqlens: (S + 1,) integers from 0 to T, the borders of the whole batch's samples, which
            may be marked by `shared_prefixes.mark_prefixes`.
        rank: the rank in the context-parallel group.
        num_ranks: the number of ranks of that group."""
    prefixes, cu_seqlens = marked_prefixes(cu_seqlens), cu_seqlens.long()
    total = int(cu_seqlens[-1])
    # output_size: without it the host would wait for the GPU's sum once more.
    starts = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff(), output_size=total)
    if prefixes is not None:
        starts = starts - prefixes.start.repeat_interleave(cu_seqlens.diff(), output_size=total)
    if num_ranks == 1:
        return torch.arange(total, device=cu_seqlens.device) - starts
    local_positions = positions_of_rank(cu_seqlens, rank, num_ranks)
    return local_positions - starts[local_positions]


def rotate_packed(
    t: Tensor, cu_seqlens: Tensor, freqs: Tensor, *args: Any, cp_group: ProcessGroup, **kwargs: Any
) -> Tensor:
    """Rotate the heads of a packed batch by the angles of their positions.

    Args:
        t: (T, h, d), queries or keys.
        cu_seqlens: (samples + 1,), the borders of the samples.
        freqs: (longest sample, 1, 1, d), the angles in radians.
        *args: those of Megatron's _apply_rotary_pos_emb_thd.
        cp_group: the context-parallel ranks.
        **kwargs: those of Megatron's function.

    Returns:
        (T, h, d)."""
    positions = marked_positions(cu_seqlens)
    if positions is None:
        positions = sample_positions(cu_seqlens, cp_group.rank(), cp_group.size())
    angles = freqs[positions]
    return rope_utils._apply_rotary_pos_emb_bshd(t[:, None], angles, *args, **kwargs)[:, 0]


def roll_packed(
    tensor: Tensor,
    shifts: int,
    dims: int,
    packed_seq_params: PackedSeqParams,
    cp_group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the tensor (..., T) with each token's value in the place before it, 0 at the end of
    every sample, and its sum.

    Megatron's _roll_tensor_packed_seq goes through the samples in Python and reads their borders
    from the device; without `PackedParams.next_token_index` it is called.

    Args:
        tensor: (..., T), any dtype.
        shifts: -1, as Megatron calls it.
        dims: -1, the tokens' dimension.
        packed_seq_params: those of the micro-batch.
        cp_group: the context-parallel ranks; None: one rank has all tokens."""
    next_token_index = getattr(packed_seq_params, "next_token_index", None)
    if next_token_index is None:
        return _MEGATRONS_ROLL(tensor, shifts, dims, packed_seq_params, cp_group)
    all_tokens = tensor
    if cp_group is not None and cp_group.size() > 1:
        # Over context parallelism: the token behind a chunk's last one is on another rank.
        gathered_tensor = tensor.new_empty(cp_group.size() * len(tensor), *tensor.shape[1:])
        dist.all_gather_into_tensor(gathered_tensor, tensor.contiguous(), group=cp_group)
        all_tokens = gathered_tensor.unflatten(0, (cp_group.size(), -1)).movedim(0, -2).flatten(-2)
    rolled_tensor = all_tokens.index_select(-1, next_token_index.clamp(min=0)) * (
        next_token_index >= 0
    )
    return rolled_tensor, rolled_tensor.sum()


_MEGATRONS_ROLL = multi_token_prediction._roll_tensor_packed_seq


def _route(
    logits: Tensor,
    topk: int,
    use_pre_softmax: bool = False,
    num_groups: int | None = None,
    group_topk: int | None = None,
    scaling_factor: float | None = None,
    score_function: str = "softmax",
    expert_bias: Tensor | None = None,
    fused: bool = False,
    router_replay: Any = None,
) -> tuple[Tensor, Tensor]:
    """Return each token's weight of each expert and whether it is routed there, (T, experts), in
    the logits' dtype and bool.

    The arguments are those of Megatron's topk_routing_with_score_function. `logits` is (T,
    experts). With `use_pre_softmax` the weights are the scores as they are, instead of normalized
    over the chosen experts. `expert_bias`, (experts,), counts in the choice only."""
    assert not fused, "no model here sets moe_router_fusion"
    fp32_logits = logits.float()
    scores = fp32_logits.softmax(-1) if score_function == "softmax" else fp32_logits.sigmoid()
    num_best = GROUP_SCORES[score_function]

    def choose(
        scores: Tensor, topk: int, num_groups: int | None = None, group_topk: int | None = None
    ) -> tuple[Tensor, Tensor]:
        if group_topk:
            assert num_groups, "topk of groups without groups"
            scores = _within_groups(scores, num_groups, group_topk, num_best)
        return scores.topk(topk, dim=-1)

    basis = scores if expert_bias is None else scores + expert_bias
    limits = {"num_groups": num_groups, "group_topk": group_topk}
    if router_replay is None:
        _, experts = choose(basis, topk, **limits)
    else:
        _, experts = router_replay.get_replay_topk(basis, topk, *limits.values(), choose)
    weights = scores.gather(1, experts)
    if not use_pre_softmax:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    weights = (weights * (scaling_factor or 1.0)).to(logits.dtype)
    is_routed = torch.zeros_like(logits, dtype=torch.bool).scatter(1, experts, True)
    return torch.zeros_like(logits).scatter(1, experts, weights), is_routed


def _within_groups(scores: Tensor, num_groups: int, group_topk: int, best: int) -> Tensor:
    """Return scores (T, experts), -inf outside the `group_topk` groups with the highest sums of
    their `best` highest scores."""
    grouped_scores = scores.unflatten(-1, (num_groups, -1))
    groups = grouped_scores.topk(best, dim=-1).values.sum(-1).topk(group_topk, dim=-1).indices
    is_left_out = torch.ones_like(grouped_scores[..., 0], dtype=torch.bool).scatter(
        1, groups, False
    )
    return grouped_scores.masked_fill(is_left_out[..., None], -torch.inf).flatten(1)


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
            "install() once in this process, after megatron_r1.models.platform.prepare()"
        )


@_patch(
    "groups of experts are scored by their best topk / group_topk, not as the models define it",
    "transformer/moe/moe_utils.py:group_limited_topk",
    "topk // group_topk",
)
def _patch_routing() -> None:
    # Without it tokens go to other experts than in transformers and vLLM, without an error.
    router.topk_routing_with_score_function = _route


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
    "an empty extra state of grouped experts is subscripted, and no checkpoint can be written",
    "extensions/transformer_engine.py:TEGroupedLinear._split_extra_state",
    'state["extra_fp8_variables"]',
)
def _patch_empty_extra_state() -> None:
    # None without Transformer Engine, and with one too old for grouped layers.
    if transformer_engine.TEGroupedLinear is not None:
        accept_empty_extra_state(transformer_engine.TEGroupedLinear)


def accept_empty_extra_state(grouped_linear: Any) -> None:
    """Have Megatron's grouped experts split an empty extra state into empty ones.

    From 2.17 on Transformer Engine writes an empty tensor for recipes without a history, which
    `_split_extra_state` decodes to None. Checkpoints leave the parts out anyway
    (`trainer.checkpoints.contents`)."""
    split = grouped_linear._split_extra_state

    @functools.wraps(split)
    def split_or_repeat(self: Any, state: Any) -> list[Any]:
        if isinstance(state, torch.Tensor) and state.numel() == 0:
            return [state] * self.num_gemms
        return split(self, state)

    grouped_linear._split_extra_state = split_or_repeat
