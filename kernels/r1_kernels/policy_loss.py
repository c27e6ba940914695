"""The clipped policy-gradient loss of PPO, GRPO, DAPO, GSPO and CISPO, from log-probabilities.

It is averaged at token or sequence level over packed sequences.

One pass over the tokens computes the loss, its derivative and every metric (formulae:
`policy_terms`); the backward pass multiplies by the upstream gradient. With a sequence-level ratio
(GSPO, arXiv 2507.18071 eq. 7), x is its mean over the unmasked tokens of the sequence, and its
derivative is the mean over the sequence."""

from typing import Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from r1_kernels.arguments import (
    check_cu_seqlens,
    check_finite,
    check_floats,
    check_same_device,
    check_tensors,
    check_tokens,
)
from r1_kernels.policy_terms import (
    DEFAULTS,
    KLEstimator,
    Objective,
    PolicySettings,
    PolicyTerms,
    TokenTensors,
)
from r1_kernels.precision import accumulation_dtype
from r1_kernels.registry import Primitives, choose_primitives

Level = Literal["token", "sequence"]


class Sequences:
    """S sequences packed into T tokens: sums over each, and per-sequence values per token.

    With a group, each of its ranks holds some tokens of every sequence, and every rank gets the
    sums of the whole sequences.

    Args:
        cu_seqlens: (S + 1,) integers from 0 to T.
        num_tokens: T.
        primitives: the implementation that sums.
        group: the ranks that share the sequences; None: this one alone.

    Raises:
        ValueError: cu_seqlens do not rise from 0 to T, or are not (S + 1,) integers."""

    def __init__(
        self,
        cu_seqlens: Tensor,
        num_tokens: int,
        primitives: Primitives,
        group: ProcessGroup | None = None,
    ):
        check_cu_seqlens(cu_seqlens, num_tokens)
        self.cu_seqlens, self.num_tokens = cu_seqlens, num_tokens
        self.primitives, self.group = primitives, group

    def sums(self, values: Tensor) -> Tensor:
        """Return the sum over each sequence, (S,), from values (T,)."""
        sums = self.primitives.segment_sums(values, self.cu_seqlens)
        if self.group is not None:
            # Over the ranks that share the sequences: each has summed its own tokens alone.
            dist.all_reduce(sums, group=self.group)
        return sums

    def spread(self, values: Tensor) -> Tensor:
        """Return for each token, (T,), the value of its sequence, from values (S,)."""
        lengths = self.cu_seqlens.diff()
        return values.repeat_interleave(lengths, output_size=self.num_tokens)

    def means(self, values: Tensor, unmasked: Tensor) -> Tensor:
        """Return for each token, (T,), the mean of `values` over its sequence's unmasked tokens."""
        total = self.sums(torch.where(unmasked, values, 0.0))
        count = self.sums(unmasked.to(total.dtype))
        return self.spread(total / count.clamp(min=1))


class Averaging(NamedTuple):
    """The average over the tokens' losses, as in the arguments of `policy_loss`.

    Attributes:
        ratio_level: "token" or "sequence".
        average: "token" or "sequence".
        denominator: what the sum is divided by; None: counted.
        cu_seqlens: (S + 1,) borders of the sequences; None: they are not needed.
        sequence_group: the ranks that share the sequences; None: this one alone."""

    ratio_level: Level = "token"
    average: Level = "token"
    denominator: float | Tensor | None = None
    cu_seqlens: Tensor | None = None
    sequence_group: ProcessGroup | None = None

    def sequences(self, num_tokens: int, primitives: Primitives) -> Sequences | None:
        """Return the sequences of the batch, or None if `average` and `ratio_level` need none.

        Args:
            num_tokens: T.
            primitives: the implementation that sums.

        Raises:
            ValueError: unknown names, missing or wrong borders, and a group of several ranks
                without a denominator: a rank cannot count the tokens of other ranks."""
        group = self.sequence_group
        if group is not None and dist.get_world_size(group) == 1:
            group = None
        if group is not None and self.denominator is None:
            raise ValueError(
                "sequence_group needs a denominator: give the number over all ranks, or 1 for the "
                "sum"
            )
        for name in ("average", "ratio_level"):
            if getattr(self, name) not in get_args(Level):
                raise ValueError(f"{name} is {getattr(self, name)!r}: use token or sequence")
        if "sequence" not in (self.average, self.ratio_level):
            return None
        if self.cu_seqlens is None:
            name = "average" if self.average == "sequence" else "ratio_level"
            raise ValueError(f'{name}="sequence" needs cu_seqlens, the borders of the sequences')
        return Sequences(self.cu_seqlens, num_tokens, primitives, group)

    def weights(self, mask: Tensor, sequences: Sequences | None, dtype: torch.dtype) -> Tensor:
        """Return the weights (T,) of `dtype` with which Σ weight · loss is the average.

        average "token": mask / denominator, by default Σ mask. "sequence": the weights of a
        sequence add up to 1 / denominator, by default the number of sequences with an unmasked
        token (GRPO). Without any unmasked token all weights are 0.

        Args:
            mask: (T,) bool, integers or weights.
            sequences: those of the batch; None with average "token".
            dtype: the dtype of the weights.

        Raises:
            ValueError: the denominator is not one positive number; the value of a tensor is not
                checked."""
        denominator = self.denominator
        if isinstance(denominator, Tensor):
            if denominator.numel() != 1:
                raise ValueError(f"denominator must be one number, got {tuple(denominator.shape)}")
            denominator = denominator.reshape(())
        elif denominator is not None:
            check_finite("denominator", denominator)
            if not denominator > 0:
                raise ValueError(f"denominator is {denominator}: it must be positive")
        mask = mask.to(dtype)
        weights = torch.where(mask <= 0, 0.0, mask)
        if self.average == "sequence":
            assert sequences is not None, "average is sequence"
            totals = sequences.sums(weights)
            weights = weights / sequences.spread(torch.where(totals == 0, 1.0, totals))
            count = (totals != 0).sum()
        else:
            count = weights.sum()
        if denominator is None:
            denominator = torch.where(count == 0, 1.0, count.to(weights.dtype))
        return weights / denominator


class PolicyLoss(NamedTuple):
    """The result of `policy_loss`. All fp32 (fp64 for fp64).

    Attributes:
        loss: (), differentiable. The others are (T,) without gradient, 0 where the mask is 0.
        ratio: ρ, not clipped.
        clipped: 1 where the clip is active, else 0.
        kl: the estimate.
        importance: v, the weight that corrects from the engine's to the trainer's policy."""

    loss: Tensor
    ratio: Tensor
    clipped: Tensor
    kl: Tensor
    importance: Tensor


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    # The loss of a token: `PolicySettings`, and what its terms read.
    clip_low: float = DEFAULTS.clip_low,
    clip_high: float = DEFAULTS.clip_high,
    dual_clip: float | None = DEFAULTS.dual_clip,
    kl_beta: float = DEFAULTS.kl_beta,
    kl_estimator: KLEstimator = DEFAULTS.kl_estimator,
    rollout_logprobs: Tensor | None = None,
    importance_cap: float | None = DEFAULTS.importance_cap,
    objective: Objective = DEFAULTS.objective,
    entropy: Tensor | None = None,
    entropy_coef: float = DEFAULTS.entropy_coef,
    # Sequences, and the average over tokens: `Averaging`.
    ratio_level: Level = "token",
    average: Level = "token",
    denominator: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    sequence_group: ProcessGroup | None = None,
    # How it is computed: None for Triton on CUDA tensors, PyTorch elsewhere.
    backend: str | None = None,
) -> PolicyLoss:
    """Compute the loss of T tokens of packed responses; differentiable in logprobs and entropy.

    The formulae are in `policy_terms`.

    Args:
        logprobs: (T,) float, nats, of the policy that is trained.
        old_logprobs: (T,), or None for logprobs themselves (ratio 1, the one update of an on-policy
            step).
        ref_logprobs: (T,), or None with kl_beta 0.
        advantages: (T,) float.
        mask: (T,) bool, integers or float weights ≥ 0; a token with 0 does not count and may hold
            NaN.
        clip_low: ε below 1; 10, DeepSeek-R1's, hardly clips, where PPO's is 0.2.
        clip_high: ε above 1.
        dual_clip: the largest ratio of a negative advantage, above 1; None: no limit.
        kl_beta: the weight of the KL estimate; the default is DeepSeek-R1's.
        kl_estimator: "k1", "k2" or "k3".
        rollout_logprobs: (T,), the engine's, or None for no correction.
        importance_cap: the largest weight of that correction, inf for no limit; None, without
            rollout_logprobs: tokens are not weighed.
        objective: "ppo" or "cispo".
        entropy: (T,), nats, for a bonus of entropy_coef · entropy.
        entropy_coef: the weight of that bonus.
        ratio_level: "token", or "sequence" (GSPO).
        average: "token" or "sequence", see `Averaging.weights`.
        denominator: the number, above 0, that the sum is divided by; 1 gives the sum; None: Σ mask,
            or with average "sequence" the number of responses with an unmasked token.
        cu_seqlens: (S + 1,) integers, the borders of the responses from 0 to T, for ratio_level or
            average "sequence".
        sequence_group: ranks that each hold some tokens of every response, as in context
            parallelism (cu_seqlens: the borders in this rank's T; the losses of the ranks add up);
            needs a denominator.
        backend: "triton" or "torch"; None: Triton for CUDA tensors (not fp64), PyTorch elsewhere.

    Returns:
        The loss, and each token's terms.

    Raises:
        ValueError: shapes, dtypes, devices and settings that do not fit, by name."""
    check_tensors(logprobs=logprobs, advantages=advantages, mask=mask)
    _check_logprobs(logprobs, entropy, entropy_coef)
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
    old_logprobs = logprobs if old_logprobs is None else old_logprobs
    inputs = TokenTensors(logprobs, old_logprobs, ref_logprobs, rollout_logprobs, advantages, mask)
    primitives = choose_primitives(logprobs, backend)
    tokens, sequences = prepare_tokens(
        inputs, settings, averaging, primitives, accumulation_dtype(logprobs.dtype), entropy=entropy
    )
    level = sequences if ratio_level == "sequence" else None
    return tokens_loss(logprobs, entropy, tokens, settings, level, primitives)


def _check_logprobs(logprobs: Tensor, entropy: Tensor | None, entropy_coef: float) -> None:
    """Require logprobs (T,), and an entropy (T,) where it has a coefficient."""
    if logprobs.dim() != 1:
        raise ValueError(f"logprobs must be (T,), got {tuple(logprobs.shape)}: flatten the batch")
    check_tokens(len(logprobs), entropy=entropy)
    check_floats(logprobs=logprobs, entropy=entropy)
    if entropy_coef and entropy is None:
        raise ValueError(f"entropy_coef is {entropy_coef}, but there is no entropy")


def prepare_tokens(
    inputs: TokenTensors,
    settings: PolicySettings,
    averaging: Averaging,
    primitives: Primitives,
    dtype: torch.dtype,
    **further_tensors: Tensor | None,
) -> tuple[TokenTensors, Sequences | None]:
    """Check the tensors of one batch. Return them detached, with weights of `dtype` for the mask.

    Args:
        inputs: the caller's tensors, with the mask as `weights`.
        settings: those of the loss.
        averaging: how the loss is averaged.
        primitives: the implementation that will compute the loss.
        dtype: the dtype of the returned weights.
        **further_tensors: those that must be on the same device.

    Raises:
        ValueError: tensors and settings that do not fit, by name."""
    tensors = inputs._asdict()
    mask = tensors.pop("weights")
    num_tokens = len(inputs.advantages if inputs.logprobs is None else inputs.logprobs)
    check_tokens(num_tokens, **tensors, mask=mask)
    check_same_device(**further_tensors, **tensors, mask=mask, cu_seqlens=averaging.cu_seqlens)
    check_floats(**tensors)
    settings.check(inputs.ref_logprobs, inputs.rollout_logprobs)
    sequences = averaging.sequences(num_tokens, primitives)
    weights = averaging.weights(mask, sequences, dtype)
    detached_inputs = [None if tensor is None else tensor.detach() for tensor in inputs]
    return TokenTensors._make(detached_inputs)._replace(weights=weights), sequences


def tokens_loss(
    logprobs: Tensor,
    entropy: Tensor | None,
    tokens: TokenTensors,
    settings: PolicySettings,
    sequences: Sequences | None,
    primitives: Primitives,
) -> PolicyLoss:
    """Compute `policy_loss` of prepared tokens.

    Args:
        logprobs: (T,), with gradient.
        entropy: (T,), or None.
        tokens: the other tensors, each (T,).
        settings: the settings of the loss.
        sequences: those whose ratio is one number, or None.
        primitives: the implementation."""
    if sequences is None:
        terms = primitives.policy_terms(tokens, settings)
        grad = terms.grad_log_ratio + terms.grad_logprob
    else:
        terms, grad = _with_sequence_ratios(tokens, settings, sequences, primitives)
    bonus = settings.entropy_coef * tokens.weights if settings.entropy_coef else None
    loss = _Loss.apply(logprobs, entropy, terms.loss, grad, bonus)
    return PolicyLoss(loss, terms.ratio, terms.clipped, terms.kl, terms.importance)


def _with_sequence_ratios(
    tokens: TokenTensors,
    settings: PolicySettings,
    sequences: Sequences,
    primitives: Primitives,
) -> tuple[PolicyTerms, Tensor]:
    """Return the terms, and the derivative (T,) of the loss by the log-probabilities."""
    unmasked = ~(tokens.weights <= 0)
    logprobs, old_logprobs = tokens.both_logprobs()
    dtype = accumulation_dtype(logprobs.dtype)
    log_ratio = logprobs.to(dtype) - old_logprobs.to(dtype)
    terms = primitives.policy_terms(
        tokens._replace(log_ratio=sequences.means(log_ratio, unmasked)), settings
    )
    # All tokens of a sequence have the same x, a mean to which each unmasked token adds 1 / |o|.
    total = sequences.sums(terms.grad_log_ratio)
    count = sequences.sums(unmasked.to(total.dtype)).clamp(min=1)
    shared_gradient = torch.where(unmasked, sequences.spread(total / count), 0.0)
    return terms, shared_gradient + terms.grad_logprob


class _Loss(torch.autograd.Function):
    """Compute Σ loss_terms - bonus · entropy; `grad` is its derivative by the logprobs.

    Saved: `grad` and `bonus`, (T,) each; the backward pass reads no input again."""

    @staticmethod
    def forward(ctx, logprobs, entropy, loss_terms, grad, bonus):
        ctx.save_for_backward(grad, bonus)
        ctx.dtypes = logprobs.dtype, None if entropy is None else entropy.dtype
        loss = loss_terms.sum()
        if bonus is not None:
            loss = loss - torch.where(bonus == 0, 0.0, bonus * entropy).sum()
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        grad, bonus = ctx.saved_tensors
        logprobs_dtype, entropy_dtype = ctx.dtypes
        grad_entropy = None if bonus is None else (-bonus * upstream).to(entropy_dtype)
        return (grad * upstream).to(logprobs_dtype), grad_entropy, None, None, None
