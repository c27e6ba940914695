"""What a device can do at most: the rate of a matrix product, or of a copy."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

TOKENS_AT_ONCE = 8_192  # logits of 65,536 tokens would not leave room for anything else
COPIED_BYTES = {"cpu": 2**27, "cuda": 2**30}


@dataclass(frozen=True)
class Bound:
    """The device's own rate, measured in the same rounds as the implementations.

    `call` does `done` units of work; the kernel needs at least `needed` units. Kernels on hidden
    states are bounded by matrix products, the others by memory traffic.

    Attributes:
        name: the bound.
        unit: "FLOP" or "B".
        call: what is timed.
        done: units of one call.
        needed: units that the kernel needs."""

    name: str
    unit: str  # "FLOP" or "B"
    call: Callable[[], None]
    done: float
    needed: float


def matrix_bound(hidden: Tensor, weight: Tensor, tokens: int, products: int) -> Bound:
    """Return the bound of a kernel on hidden states: torch.mm alone, on `tokens` rows.

    On a GPU the logits and the weight's gradient are written in fp32, as by a kernel that rounds
    neither.

    Args:
        hidden: (T, H).
        weight: (V, H).
        tokens: the number of rows.
        products: 1, the logits; 3, also the gradients of hidden states and weight."""
    rows = hidden[:TOKENS_AT_ONCE]
    rounds = rows.is_cuda and rows.dtype != torch.float32
    product: Callable[[Tensor, Tensor], Tensor] = torch.mm
    if rounds:
        product = partial(torch.mm, out_dtype=torch.float32)
    d_logits = rows.new_ones(len(rows), len(weight))

    def call() -> None:
        product(rows, weight.t())
        if products == 3:
            torch.mm(d_logits, weight)
            product(d_logits.t(), rows)

    flops = 2.0 * products * weight.numel()
    name = f"torch.mm, {'these three products' if products == 3 else 'this product'} alone"
    return Bound(name, "FLOP", call, flops * len(rows), flops * tokens)


def copy_bound(device: torch.device, needed_bytes: int) -> Bound:
    """A copy within the device's memory; each byte counts as read and as written."""
    num_bytes = COPIED_BYTES[device.type]

    def call() -> None:
        target.copy_(source)

    # Filled here, so that no page is first mapped while the call is timed.
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    return Bound("a copy within its memory", "B", call, 2.0 * num_bytes, float(needed_bytes))
