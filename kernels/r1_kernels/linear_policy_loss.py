"""The policy loss from hidden states, with a keyword for each setting in place of three objects."""

from torch import Tensor
from torch.distributed import ProcessGroup

from r1_kernels.averaging import Averaging, Level
from r1_kernels.fused_policy_loss import LinearPolicyLoss, linear_policy_loss_from_settings
from r1_kernels.policy_terms import DEFAULTS, KLEstimator, Objective, PolicySettings, TokenTensors
from r1_kernels.sampling_mask import SamplingMask


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    # The head, as in `linear_token_logprobs`.
    temperature: float = 1.0,
    group: ProcessGroup | None = None,
    vocab_size: int | None = None,
    sampling_mask: SamplingMask | None = None,
    chunk_tokens: int | None = None,
    reduce_hidden_grad: bool = True,
    main_grad: Tensor | None = None,
    # The loss of a token: `PolicySettings`, and what its terms read.
    clip_low: float = DEFAULTS.clip_low,
    clip_high: float = DEFAULTS.clip_high,
    dual_clip: float | None = DEFAULTS.dual_clip,
    kl_beta: float = DEFAULTS.kl_beta,
    kl_estimator: KLEstimator = DEFAULTS.kl_estimator,
    rollout_logprobs: Tensor | None = None,
    importance_cap: float | None = DEFAULTS.importance_cap,
    objective: Objective = DEFAULTS.objective,
    entropy_coef: float = DEFAULTS.entropy_coef,
    # Sequences, and the average over tokens: `Averaging`.
    ratio_level: Level = "token",
    average: Level = "token",
    denominator: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    sequence_group: ProcessGroup | None = None,
    # How it is computed: rows that are known; Triton on CUDA tensors, PyTorch elsewhere.
    rows: Tensor | None = None,
    backend: str | None = None,
) -> LinearPolicyLoss:
    """Compute `linear_policy_loss_from_settings` of the objects that it makes of its arguments.

    Autocast is off inside: the output layer computes in the dtype of hidden and weight.

    Args:
        hidden: (T, H) float.
        weight: (V_local, H) of the same dtype, this rank's equal contiguous share of the vocabulary
            over `group`.
        targets: (T,) int64 or int32 global ids, read where the mask is not 0.
        old_logprobs: (T,), or None for the present policy's own (ratio 1), for the one update of an
            on-policy step.
        ref_logprobs: (T,), or None with kl_beta 0.
        advantages: (T,) float.
        mask: (T,) bool, integers or float weights ≥ 0; a token with 0 is left out of every product.
        temperature: the logits are divided by it.
        group: the ranks that share the vocabulary; None: this rank has all of it.
        vocab_size: ids from here on are padding; None: there is none.
        sampling_mask: the ids that the sampler kept at each of the T tokens, read where `mask` is
            not 0; every log-probability given here must be of the same cut. None: the whole
            vocabulary.
        chunk_tokens: tokens whose logits exist at once; None: chosen by device and vocabulary.
        reduce_hidden_grad: whether the gradient of `hidden` is summed over the group; False leaves
            this rank's part.
        main_grad: (V_local, H) fp32 (fp64 for fp64), to which backward passes add the weight's
            gradient, unrounded (`linear_token_logprobs`); None: nothing.
        clip_low: as in `PolicySettings`, like the settings below.
        clip_high: `PolicySettings.clip_high`.
        dual_clip: `PolicySettings.dual_clip`.
        kl_beta: `PolicySettings.kl_beta`.
        kl_estimator: `PolicySettings.kl_estimator`.
        rollout_logprobs: (T,), the engine's, or None for no correction.
        importance_cap: `PolicySettings.importance_cap`; None only without `rollout_logprobs`.
        objective: `PolicySettings.objective`.
        entropy_coef: `PolicySettings.entropy_coef`, of the head's own entropy.
        ratio_level: `Averaging.ratio_level`; "sequence" (GSPO) takes one product more.
        average: `Averaging.average`.
        denominator: `Averaging.denominator`.
        cu_seqlens: `Averaging.cu_seqlens`.
        sequence_group: `Averaging.sequence_group`.
        rows: the indices, rising, of all tokens whose mask is not 0, int64, for callers that have
            them; to find them here, the host waits for the device.
        backend: "triton" or "torch"; None: Triton for CUDA tensors (not fp64), PyTorch elsewhere.

    Returns:
        The loss, and each token's terms.

    Raises:
        ValueError: shapes, dtypes, devices, targets and settings that do not fit, by name."""
    settings = PolicySettings(
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        kl_beta=kl_beta,
        kl_estimator=kl_estimator,
        importance_cap=importance_cap,
        objective=objective,
        entropy_coef=entropy_coef,
    )
    averaging = Averaging(ratio_level, average, denominator, cu_seqlens, sequence_group)
    tokens = TokenTensors(None, old_logprobs, ref_logprobs, rollout_logprobs, advantages, mask)
    return linear_policy_loss_from_settings(
        hidden,
        weight,
        targets,
        tokens,
        settings,
        averaging,
        temperature=temperature,
        group=group,
        vocab_size=vocab_size,
        sampling_mask=sampling_mask,
        chunk_tokens=chunk_tokens,
        reduce_hidden_grad=reduce_hidden_grad,
        main_grad=main_grad,
        rows=rows,
        backend=backend,
    )
