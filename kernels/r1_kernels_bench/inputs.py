"""Seeded inputs of every kernel with their exact results, and the shapes of the problem with
presets for the usual ones.

Logits spread like a language model's (standard deviation 3) and a target raised by up to 20, so
that log-probabilities run from about -16 to 0. Tokens are packed sequences of equal length, each
with its own advantage and a short masked tail, about 6% of all tokens. Every sequence's last
position is masked, since implementations that shift logits against targets have none for it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from r1_kernels import examples, registry
from r1_kernels.sampling_mask import SamplingMask
from torch import Tensor

from r1_kernels_bench import device_bounds, eager, reference

DTYPE_NAMES = ("bfloat16", "float16", "float32")
LONGEST_SEQUENCE = 4_096


@dataclass(frozen=True)
class ProblemSizes:
    """The sizes of a kernel's problem, and the data type of its inputs.

    Attributes:
        tokens: tokens of the batch (T).
        vocab: entries of the whole vocabulary (V), over all tensor-parallel ranks.
        hidden: the width of the hidden states (H).
        dtype: the name of the data type, of `DTYPE_NAMES`.
        tp: the number of tensor-parallel ranks."""

    tokens: int
    vocab: int
    hidden: int
    dtype: str
    tp: int = 1

    def __post_init__(self) -> None:
        for name in ("tokens", "vocab", "hidden", "tp"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give a positive number")
        if self.vocab % self.tp:
            raise ValueError(f"vocab {self.vocab} does not divide by tp {self.tp}: change one")
        if self.tokens % self.sequences:
            raise ValueError(f"tokens is {self.tokens}: give a multiple of {self.sequences}")

    @property
    def torch_dtype(self) -> Any:
        import torch  # here, so that --help does not import it

        return getattr(torch, self.dtype)

    @property
    def shard(self) -> int:
        """Vocabulary entries on one rank; only one rank is measured."""
        return self.vocab // self.tp

    @property
    def sequences(self) -> int:
        """Packed sequences of equal length: at least 8, none longer than LONGEST_SEQUENCE."""
        return max(8, -(-self.tokens // LONGEST_SEQUENCE))

    @property
    def length(self) -> int:
        return self.tokens // self.sequences

    def __str__(self) -> str:
        share = f" (1/{self.tp} of {self.vocab:,})" if self.tp > 1 else ""
        shape = (
            f"{self.tokens:,} tokens x {self.shard:,} vocabulary{share} x {self.hidden:,} hidden"
        )
        return f"{shape}, {self.dtype}"


# `full` is DeepSeek-V3's output layer on one micro-batch, `shard` what one of eight tensor-parallel
# ranks holds of it; `cpu` takes eager PyTorch 3 GB.
PRESETS = {
    "full": ProblemSizes(65_536, 129_280, 7_168, "bfloat16"),
    "shard": ProblemSizes(65_536, 129_280, 7_168, "bfloat16", tp=8),
    "cpu": ProblemSizes(1_536, 129_280, 128, "float32"),
    "tiny": ProblemSizes(64, 1_000, 32, "float32"),
}


SPREAD = 3.0
LARGEST_LIFT = 20.0
KEPT_IDS = 20  # of each token where a sampler's cut is timed: a usual top_k
POLICY_DRIFT = 0.1  # standard deviation of the old and reference log-probabilities around the new


def seeded_generator(device: torch.device) -> dict[str, Any]:
    """Return the options of PyTorch's random functions."""
    return {"generator": torch.Generator(device).manual_seed(0), "device": device}


@dataclass
class Tokens:
    """Per-token inputs besides the logits: (T,) fp32, targets int64; T = sequences x length.

    Attributes:
        targets: (T,) int64 ids.
        mask: (T,), 0 for tokens that are left out.
        advantages: (T,).
        old: (T,), log-probabilities of the old policy.
        ref: (T,), those of the reference.
        sequences: how many the T tokens are."""

    targets: Tensor
    mask: Tensor
    advantages: Tensor
    old: Tensor
    ref: Tensor
    sequences: int

    @property
    def loss_inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.old, self.ref, self.advantages, self.mask

    def rows(self, value: Tensor) -> Tensor:
        """Reshape (T, ...) to (sequences, length, ...)."""
        return value.unflatten(0, (self.sequences, -1))

    @cached_property
    def sequence_advantages(self) -> Tensor:
        return self.rows(self.advantages)[:, 0].contiguous()

    @cached_property
    def without_last(self) -> list[Tensor]:
        """Return targets, mask, old and ref as rows without their last position."""
        parts = self.targets, self.mask, self.old, self.ref
        return [self.rows(part)[:, :-1].contiguous() for part in parts]


def make_tokens(
    sizes: ProblemSizes, targets: Tensor, logprobs: Tensor, random: dict[str, Any]
) -> Tokens:
    """Return seeded inputs of a policy loss.

    Args:
        sizes: the numbers of sequences and tokens.
        targets: (T,), the target ids.
        logprobs: (T,), the policy's log-probabilities, near which the old and the reference's are
            drawn.
        random: generator and device of the drawn tensors."""
    length, column = sizes.length, (sizes.sequences, 1)
    ends = torch.randint(length * 7 // 8, length, column, **random)
    mask = (torch.arange(length, device=targets.device) < ends).float().flatten()
    advantages = torch.randn(column, **random).expand(-1, length).flatten()
    old_logprobs, ref_logprobs = (
        logprobs.float() + torch.randn(2, sizes.tokens, **random) * POLICY_DRIFT
    )
    return Tokens(targets, mask, advantages, old_logprobs, ref_logprobs, sizes.sequences)


class Inputs:
    """The tensors that every implementation of a case is called with.

    Attributes:
        tokens: the inputs per token.
        logprobs: (T,) fp64, the exact ones.
        checks: the error of each result that a call may return, with the error's name."""

    tokens: Tokens
    logprobs: Tensor
    checks: dict[str, tuple[str, Callable[[Tensor], float]]]

    def errors(self, outputs: dict[str, Tensor]) -> dict[str, float]:
        checks = {name: self.checks[name] for name in self.checks if name in outputs}
        return {label: error(outputs[name]) for name, (label, error) in checks.items()}

    def check_logprobs(self) -> tuple[str, Callable[[Tensor], float]]:
        is_real = self.tokens.mask > 0
        return "log-probs", lambda got: reference.largest_error(
            got[is_real], self.logprobs[is_real]
        )


class HiddenInputs(Inputs):
    """hidden (T, H) and weight (V, H), both leaves; upstream (T,): the policy loss's gradient."""

    def __init__(self, sizes: ProblemSizes, device: torch.device) -> None:
        random_options = seeded_generator(device)
        targets = torch.randint(sizes.shard, (sizes.tokens,), **random_options)
        weight = torch.randn(sizes.shard, sizes.hidden, **random_options) * (
            SPREAD / sizes.hidden**0.5
        )
        hidden = torch.randn(sizes.tokens, sizes.hidden, **random_options)
        lift = torch.rand(sizes.tokens, 1, **random_options) * (LARGEST_LIFT / SPREAD**2)
        hidden += lift * weight[targets]
        self.hidden = hidden.to(sizes.torch_dtype).requires_grad_()
        self.weight = weight.to(sizes.torch_dtype).requires_grad_()
        del hidden, weight
        self._compute_reference(sizes, targets, random_options)

    @torch.no_grad()
    def _compute_reference(
        self, sizes: ProblemSizes, targets: Tensor, random: dict[str, Any]
    ) -> None:
        hidden, weight, device = self.hidden, self.weight, self.hidden.device
        exact_weight = weight.double()

        def logits_of(part: slice | Tensor) -> Tensor:
            return hidden[part].double() @ exact_weight.t()

        lse, self.logprobs = reference.normalizers(logits_of, targets, len(weight))
        self.tokens = make_tokens(sizes, targets, self.logprobs, random)
        with torch.enable_grad():
            _, upstream = reference.policy_gradient(self.logprobs, *self.tokens.loss_inputs)
        self.upstream = upstream.float()
        self.rows = reference.sample_rows(len(hidden), device)
        self.columns = torch.cat([reference.sample_rows(len(weight), device), targets[self.rows]])
        d_logits = reference.logits_gradient(
            logits_of(self.rows), targets[self.rows], lse[self.rows], upstream[self.rows]
        )
        self.exact_hidden = d_logits @ exact_weight
        self.exact_weight = reference.weight_gradient(
            hidden, weight, self.columns, targets, lse, upstream
        )
        self.checks = {
            "logprobs": self.check_logprobs(),
            "hidden": (
                "d hidden",
                lambda d: reference.relative_error(d[self.rows], self.exact_hidden),
            ),
            "weight": (
                "d weight",
                lambda d: reference.relative_error(d[self.columns], self.exact_weight),
            ),
        }

    @cached_property
    def sampling_mask(self) -> SamplingMask:
        """Of each token the target and other ids, `KEPT_IDS` in all, as top-k keeps them."""
        targets, vocab = self.tokens.targets, len(self.weight)
        num_kept = min(KEPT_IDS, vocab)
        steps = torch.arange(num_kept, device=targets.device) * (vocab // num_kept)
        token_ids = ((targets[:, None] + steps) % vocab).sort().values.int().flatten()
        offsets = torch.arange(len(targets) + 1, device=targets.device) * num_kept
        return SamplingMask(token_ids, offsets)

    def leaves(self, gradients: bool) -> tuple[Tensor, Tensor]:
        """Return hidden and weight; detached ones, unless `gradients`, as some peers check
        requires_grad, not the grad mode, to decide what to save."""
        hidden, weight = self.hidden, self.weight
        return (hidden, weight) if gradients else (hidden.detach(), weight.detach())

    def bound(self, gradients: bool, masked: bool) -> device_bounds.Bound:
        """Return the least time that the matrix products can take.

        Args:
            gradients: whether the gradients are computed.
            masked: whether masked tokens need not be computed."""
        tokens = int((self.tokens.mask > 0).sum()) if masked else len(self.hidden)
        return device_bounds.matrix_bound(*self.leaves(False), tokens, 3 if gradients else 1)


class LogitsInputs(Inputs):
    """logits (T, V), a leaf; upstream (T,): the policy loss's gradient."""

    def __init__(self, sizes: ProblemSizes, device: torch.device) -> None:
        random_options = seeded_generator(device)
        targets = torch.randint(sizes.shard, (sizes.tokens,), **random_options)
        self.logits = torch.empty(sizes.tokens, sizes.shard, dtype=sizes.torch_dtype, device=device)
        for part in reference.row_chunks(sizes.tokens, sizes.shard, device):
            rows = torch.randn(part.stop - part.start, sizes.shard, **random_options).mul_(SPREAD)
            lift = torch.rand(len(rows), 1, **random_options) * LARGEST_LIFT
            self.logits[part] = rows.scatter_add_(1, targets[part, None], lift)
        self.pristine = self.logits.clone()
        self.logits.requires_grad_()
        lse, self.logprobs = reference.normalizers(
            lambda part: self.pristine[part].double(), targets, sizes.shard
        )
        self.tokens = make_tokens(sizes, targets, self.logprobs, random_options)
        _, upstream = reference.policy_gradient(self.logprobs, *self.tokens.loss_inputs)
        self.upstream = upstream.float()
        self.rows = sample = reference.sample_rows(sizes.tokens, device)
        self.exact = reference.logits_gradient(
            self.pristine[sample].double(), targets[sample], lse[sample], upstream[sample]
        )
        self.checks = {
            "logprobs": self.check_logprobs(),
            "logits": ("d logits", lambda d: reference.relative_error(d[sample], self.exact)),
        }

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the logits after an implementation that overwrites them."""
        self.logits.copy_(self.pristine)

    def bound(self, gradients: bool, masked: bool) -> device_bounds.Bound:
        """The logits are read once; with gradients, read twice and written once."""
        num_bytes = self.logits.numel() * self.logits.element_size()
        return device_bounds.copy_bound(self.logits.device, num_bytes * (3 if gradients else 1))


class PolicyInputs(Inputs):
    """logprobs (T,) fp32, a leaf, and the tokens' other inputs."""

    def __init__(self, sizes: ProblemSizes, device: torch.device) -> None:
        random_options = seeded_generator(device)
        targets = torch.zeros(sizes.tokens, dtype=torch.long, device=device)
        logprobs = -LARGEST_LIFT * torch.rand(sizes.tokens, **random_options)
        self.logprobs = logprobs.requires_grad_()
        self.tokens = make_tokens(sizes, targets, logprobs.detach(), random_options)
        self.exact_loss, self.exact = reference.policy_gradient(logprobs, *self.tokens.loss_inputs)
        self.checks = {
            "loss": ("loss", partial(reference.largest_error, exact=self.exact_loss)),
            "logprobs": ("d log-probs", partial(reference.relative_error, exact=self.exact)),
        }

    def bound(self, gradients: bool, masked: bool) -> device_bounds.Bound:
        """Five inputs (log-probs, old, ref, advantages, mask) are read, one gradient is written."""
        return device_bounds.copy_bound(self.logprobs.device, 6 * 4 * len(self.logprobs))


class MatrixInputs(Inputs):
    """x (V, H): a weight, its fp8 values and block scales; exact ones of a sample of its rows."""

    def __init__(self, sizes: ProblemSizes, device: torch.device) -> None:
        x = torch.randn(sizes.shard, sizes.hidden, **seeded_generator(device))
        self.x = x.mul_(sizes.hidden**-0.5).to(sizes.torch_dtype)
        del x
        self.quantized, self.scale = eager.eager_quantize(self.x)
        self.rows = reference.sample_rows(sizes.shard, device)
        self.exact_scale = self._scales_in_fp64(self.rows)
        scaled_rows = self.x[self.rows].double() / self.exact_scale
        codes = scaled_rows.float().to(torch.float8_e4m3fn).float()
        values = self.quantized[self.rows].double() * self._spread_scale(self.scale.double())

        def codes_off(output: Tensor) -> float:
            return (output[self.rows].float() != codes).double().mean().item()

        self.checks = {
            "scale": (
                "scales",
                lambda s: reference.relative_error(self._spread_scale(s), self.exact_scale),
            ),
            "quantized": ("codes off", codes_off),
            "values": (
                "values",
                lambda output: reference.relative_error(output[self.rows], values),
            ),
        }

    def _scales_in_fp64(self, rows: Tensor) -> Tensor:
        """Return the scale of each element of `rows`, by a separate walk over 128 x 128 blocks."""
        amax = torch.stack([self.x[r // 128 * 128 :][:128].abs().amax(0) for r in rows.tolist()])
        parts = amax.double().split(128, 1)
        blocks = [part.amax(1, keepdim=True).expand_as(part) for part in parts]
        return torch.cat(blocks, 1).clamp(min=eager.SMALLEST_AMAX) / eager.FP8_MAX

    def _spread_scale(self, scale: Tensor) -> Tensor:
        spread_scale = scale[self.rows // 128].repeat_interleave(128, 1)
        return spread_scale[:, : self.x.shape[1]]

    def bound(self, gradients: bool, masked: bool) -> device_bounds.Bound:
        """The matrix is read and its fp8 codes are written, or the other way around."""
        return device_bounds.copy_bound(self.x.device, self.x.numel() * (self.x.element_size() + 1))


class ExampleInputs(Inputs):
    """The arguments of a registered kernel's first example; exact results: plain PyTorch, fp64.

    Args:
        kernel: the registered kernel, by whose name its plain-PyTorch form is found.
        sizes: the sizes of the problem; the example has the vocabulary's part of one rank.
        device: where the arguments are."""

    def __init__(self, kernel: registry.Kernel, sizes: ProblemSizes, device: torch.device) -> None:
        torch.manual_seed(0)
        shape = examples.ExampleSizes(
            sizes.tokens, sizes.shard, (sizes.shard, sizes.hidden), sizes.sequences
        )
        example = next(examples.example_launches(kernel, shape, str(device)))
        self.arguments = example.arguments
        self.num_bytes = int(example.least_bytes * example.num_elements)
        self.device = device
        exact_results = getattr(registry.load_primitives("torch"), kernel.name)(
            *_to_fp64(self.arguments)
        )
        self.checks = {
            name: (name, partial(reference.relative_error, exact=value))
            for name, value in self.results(exact_results).items()
        }

    @staticmethod
    def results(returned: Any) -> dict[str, Tensor]:
        """Return a primitive's tensors by name, or by number if it returns a plain tuple."""
        if isinstance(returned, Tensor):
            return {"result": returned}
        names = getattr(returned, "_fields", map(str, range(len(returned))))
        return dict(zip(names, returned, strict=True))

    def bound(self, gradients: bool, masked: bool) -> device_bounds.Bound:
        """The bytes that `examples` gives as the least."""
        return device_bounds.copy_bound(self.device, self.num_bytes)


def _to_fp64(value: Any) -> Any:
    """Return an argument with its floating tensors, also those in tuples, in fp64."""
    if isinstance(value, tuple):
        parts = [_to_fp64(part) for part in value]
        return value._make(parts) if hasattr(value, "_make") else tuple(parts)
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
