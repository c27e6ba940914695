"""Seeded inputs of every kernel, with their exact results.

Logits spread like a language model's (standard deviation 3) and a target raised by up to 20, so
that log-probabilities run from about -16 to 0. Tokens are packed sequences of equal length, each
with its own advantage and a short masked tail, about 6% of all tokens. Every sequence's last
position is masked, since implementations that shift logits against targets have none for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tools.bench.kernels import eager, measure, truth
from tools.bench.kernels.sizes import Sizes

SPREAD = 3.0
LARGEST_LIFT = 20.0
Outputs = dict[str, Tensor]
POLICY_DRIFT = 0.1  # standard deviation of the old and reference log-probabilities around the new


def seeded(device: torch.device, seed: int = 0) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


@dataclass
class Tokens:
    """Per-token inputs beside the logits, each (T,) fp32, targets int64; T = sequences x length."""

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


def make_tokens(
    sizes: Sizes, targets: Tensor, logprobs: Tensor, generator: torch.Generator
) -> Tokens:
    device, shape = targets.device, (sizes.sequences, sizes.length)
    ends = torch.randint(
        sizes.length * 7 // 8,
        sizes.length,
        (sizes.sequences, 1),
        generator=generator,
        device=device,
    )
    mask = (torch.arange(sizes.length, device=device) < ends).float().flatten()
    advantages = torch.randn(sizes.sequences, 1, generator=generator, device=device)
    noise = torch.randn(2, sizes.tokens, generator=generator, device=device) * POLICY_DRIFT
    old, ref = logprobs.float() + noise
    advantages = advantages.expand(shape).flatten()
    return Tokens(targets, mask, advantages, old, ref, sizes.sequences)


class HiddenInputs:
    """hidden (T, H) and weight (V, H), both leaves; upstream (T,): the policy loss's gradient."""

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        self.sizes, generator = sizes, seeded(device)
        options = {"generator": generator, "device": device}
        targets = torch.randint(sizes.shard, (sizes.tokens,), **options)
        weight = torch.randn(sizes.shard, sizes.hidden, **options) * (SPREAD / sizes.hidden**0.5)
        hidden = torch.randn(sizes.tokens, sizes.hidden, **options)
        lift = torch.rand(sizes.tokens, 1, **options) * (LARGEST_LIFT / SPREAD**2)
        hidden += lift * weight[targets]
        self.hidden = hidden.to(sizes.torch_dtype).requires_grad_()
        self.weight = weight.to(sizes.torch_dtype).requires_grad_()
        del hidden, weight
        self._solve(targets, generator)

    @torch.no_grad()
    def _solve(self, targets: Tensor, generator: torch.Generator) -> None:
        hidden, weight, device = self.hidden, self.weight, self.hidden.device
        exact_weight = weight.double()

        def logits_of(part: slice | Tensor) -> Tensor:
            return hidden[part].double() @ exact_weight.t()

        lse, self.logprobs = truth.normalisers(logits_of, targets, len(weight))
        self.tokens = make_tokens(self.sizes, targets, self.logprobs, generator)
        with torch.enable_grad():
            _, upstream = truth.policy_gradient(self.logprobs, *self.tokens.loss_inputs)
        self.upstream = upstream.float()
        self.rows = truth.sample(len(hidden), device)
        self.columns = torch.cat([truth.sample(len(weight), device), targets[self.rows]])
        of_rows = truth.logits_gradient(
            logits_of(self.rows),
            targets[self.rows],
            lse[self.rows],
            upstream[self.rows],
        )
        self.exact_hidden = of_rows @ exact_weight
        self.exact_weight = truth.weight_gradient(
            hidden, weight, self.columns, targets, lse, upstream
        )

    def leaves(self, gradients: bool) -> tuple[Tensor, Tensor]:
        """Return hidden and weight; detached ones, unless `gradients`, as some peers check
        requires_grad, not the grad mode, to decide what to save."""
        leaves = self.hidden, self.weight
        return leaves if gradients else tuple(leaf.detach() for leaf in leaves)

    def errors(self, outputs: Outputs) -> dict[str, float]:
        found, real = {}, self.tokens.mask > 0
        if "logprobs" in outputs:
            found["log-probs"] = truth.largest(outputs["logprobs"][real], self.logprobs[real])
        if "hidden" in outputs:
            found["d hidden"] = truth.relative(outputs["hidden"][self.rows], self.exact_hidden)
        if "weight" in outputs:
            found["d weight"] = truth.relative(outputs["weight"][self.columns], self.exact_weight)
        return found

    def bound(self, gradients: bool, masked: bool) -> measure.Bound:
        """masked: masked tokens need not be computed."""
        tokens = int((self.tokens.mask > 0).sum()) if masked else len(self.hidden)
        return measure.matrix_bound(
            self.hidden.detach(), self.weight.detach(), tokens, 3 if gradients else 1
        )


class LogitsInputs:
    """logits (T, V), a leaf; upstream (T,): the policy loss's gradient."""

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        self.sizes, generator = sizes, seeded(device)
        options = {"generator": generator, "device": device}
        targets = torch.randint(sizes.shard, (sizes.tokens,), **options)
        self.logits = torch.empty(sizes.tokens, sizes.shard, dtype=sizes.torch_dtype, device=device)
        for part in truth.chunks(sizes.tokens, sizes.shard, device):
            rows = torch.randn(part.stop - part.start, sizes.shard, **options).mul_(SPREAD)
            lift = torch.rand(len(rows), 1, **options) * LARGEST_LIFT
            self.logits[part] = rows.scatter_add_(1, targets[part, None], lift).to(
                self.logits.dtype
            )
        self.pristine = self.logits.clone()
        self.logits.requires_grad_()
        lse, self.logprobs = truth.normalisers(
            lambda part: self.pristine[part].double(), targets, sizes.shard
        )
        self.tokens = make_tokens(sizes, targets, self.logprobs, generator)
        _, upstream = truth.policy_gradient(self.logprobs, *self.tokens.loss_inputs)
        self.upstream = upstream.float()
        self.rows = at = truth.sample(sizes.tokens, device)
        self.exact = truth.logits_gradient(
            self.pristine[at].double(), targets[at], lse[at], upstream[at]
        )

    def errors(self, outputs: Outputs) -> dict[str, float]:
        found, real = {}, self.tokens.mask > 0
        if "logprobs" in outputs:
            found["log-probs"] = truth.largest(outputs["logprobs"][real], self.logprobs[real])
        if "logits" in outputs:
            found["d logits"] = truth.relative(outputs["logits"][self.rows], self.exact)
        return found

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the logits after an implementation that overwrites them."""
        self.logits.copy_(self.pristine)

    def bound(self, gradients: bool, masked: bool) -> measure.Bound:
        """The logits are read once; with gradients, read twice and written once."""
        num_bytes = self.logits.numel() * self.logits.element_size()
        return measure.copy_bound(self.logits.device, num_bytes * (3 if gradients else 1))


class PolicyInputs:
    """logprobs (T,) fp32, a leaf, and the tokens' other inputs."""

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        generator = seeded(device)
        targets = torch.zeros(sizes.tokens, dtype=torch.long, device=device)
        logprobs = -LARGEST_LIFT * torch.rand(sizes.tokens, generator=generator, device=device)
        self.logprobs = logprobs.requires_grad_()
        self.tokens = make_tokens(sizes, targets, logprobs.detach(), generator)
        self.exact_loss, self.exact = truth.policy_gradient(logprobs, *self.tokens.loss_inputs)

    def errors(self, outputs: Outputs) -> dict[str, float]:
        return {
            "loss": truth.largest(outputs["loss"], self.exact_loss),
            "d log-probs": truth.relative(outputs["logprobs"], self.exact),
        }

    def bound(self, gradients: bool, masked: bool) -> measure.Bound:
        """Five inputs (log-probs, old, ref, advantages, mask) are read, one gradient is written."""
        return measure.copy_bound(self.logprobs.device, 6 * 4 * len(self.logprobs))


class MatrixInputs:
    """x (V, H): a weight, its fp8 values and block scales; exact ones of a sample of its rows."""

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        x = torch.randn(sizes.shard, sizes.hidden, generator=seeded(device), device=device)
        self.x = x.mul_(sizes.hidden**-0.5).to(sizes.torch_dtype)
        del x
        self.quantized, self.scale = eager.quantize(self.x)
        self.rows = truth.sample(sizes.shard, device)
        self.exact_scale = self._scales_in_fp64(self.rows)
        scaled = self.x[self.rows].double() / self.exact_scale
        self.exact_codes = scaled.float().to(torch.float8_e4m3fn).float()
        values = self.quantized[self.rows].double()
        self.exact_values = values * self._of_rows(self.scale.double())

    def _scales_in_fp64(self, rows: Tensor) -> Tensor:
        """Return the scale of each element of `rows`, by a separate walk over 128 x 128 blocks."""
        amax = torch.stack([self.x[r // 128 * 128 :][:128].abs().amax(0) for r in rows.tolist()])
        blocks = [
            part.amax(1, keepdim=True).expand_as(part) for part in amax.double().split(128, 1)
        ]
        return torch.cat(blocks, 1).clamp(min=eager.SMALLEST_AMAX) / eager.FP8_MAX

    def _of_rows(self, scale: Tensor) -> Tensor:
        spread = scale[self.rows // 128].repeat_interleave(128, 1)
        return spread[:, : self.x.shape[1]]

    def errors(self, outputs: Outputs) -> dict[str, float]:
        found = {}
        if "quantized" in outputs:
            codes = outputs["quantized"][self.rows].float()
            found["scales"] = truth.relative(self._of_rows(outputs["scale"]), self.exact_scale)
            found["codes off"] = (codes != self.exact_codes).double().mean().item()
        if "values" in outputs:
            found["values"] = truth.relative(outputs["values"][self.rows], self.exact_values)
        return found

    def bound(self, gradients: bool, masked: bool) -> measure.Bound:
        """The matrix is read and its fp8 codes are written, or the other way around."""
        return measure.copy_bound(self.x.device, self.x.numel() * (self.x.element_size() + 1))
