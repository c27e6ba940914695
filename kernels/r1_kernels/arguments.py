"""Checks of arguments; each raises ValueError with the argument's name before any work starts.

Shapes, dtypes and devices cost nothing. Checks of values (targets within the vocabulary, borders of
sequences in order) read the device, and the host waits until its queue is empty:
`trusted_values` leaves them out."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


_is_trusted = ContextVar("values are trusted", default=False)


@contextmanager
def trusted_values() -> Iterator[None]:
    """Leave out the checks of targets, cu_seqlens and sampling masks inside the block.

    For callers that have made them on the host. A target outside the vocabulary then gives a wrong
    number and no error; one that its sampling mask does not have, NaN."""
    token = _is_trusted.set(True)
    try:
        yield
    finally:
        _is_trusted.reset(token)


def has_trusted_values() -> bool:
    """Return whether `trusted_values` leaves out the checks of values."""
    return _is_trusted.get()


def check_floats(**tensors: Tensor | None) -> None:
    """Require each to be None, or floating point."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in FLOAT_DTYPES:
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}")


def check_tensors(**tensors: Tensor) -> None:
    """Require each to be a tensor of real numbers."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.is_complex():
            raise ValueError(f"{name} must be real, got {tensor.dtype}")


def check_same_device(**tensors: Tensor | None) -> None:
    """Require each to be None, or a tensor on the device of the first."""
    check_tensors(**{name: t for name, t in tensors.items() if t is not None})
    named_devices = [
        (name, tensor.device) for name, tensor in tensors.items() if tensor is not None
    ]
    first, first_device = named_devices[0]
    for name, device in named_devices:
        if device != first_device:
            raise ValueError(
                f"{name} is on {device}, {first} on {first_device}: put them on one device"
            )


def check_head(hidden: Tensor, weight: Tensor) -> None:
    """Require `hidden` (T, H) and `weight` (V_local, H) of one floating dtype."""
    check_floats(hidden=hidden)
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden must be (T, H) and weight (V, H), got {tuple(hidden.shape)} and "
            f"{tuple(weight.shape)}"
        )
    if weight.dtype != hidden.dtype:
        raise ValueError(
            f"weight is {weight.dtype}, hidden {hidden.dtype}: give both one dtype, under "
            "autocast weight.to(hidden.dtype)"
        )


def check_main_grad(main_grad: Tensor, weight: Tensor) -> None:
    """Require `main_grad` to have the shape and device of `weight`, in fp32 (fp64 for fp64)."""
    check_same_device(weight=weight, main_grad=main_grad)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    if main_grad.shape != weight.shape or main_grad.dtype != dtype:
        raise ValueError(
            f"main_grad must be {tuple(weight.shape)} {dtype} like weight, got "
            f"{tuple(main_grad.shape)} {main_grad.dtype}"
        )


def check_targets(
    targets: Tensor, num_tokens: int, vocab_size: int, unmasked: Tensor | None = None
) -> None:
    """Require targets that are ids of the vocabulary.

    Args:
        targets: (T,) integers in 0 … vocab_size - 1.
        num_tokens: T.
        vocab_size: the ids in the whole vocabulary.
        unmasked: the tokens whose ids count, int64 indices or (T,) booleans; None: all.

    Raises:
        ValueError: a wrong shape or dtype, or an id outside the vocabulary."""
    if targets.shape != (num_tokens,):
        raise ValueError(f"targets must be ({num_tokens},), got {tuple(targets.shape)}")
    if targets.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"targets must be int64 or int32, got {targets.dtype}")
    if _is_trusted.get():
        return
    if unmasked is not None:
        targets = targets[unmasked]
    if targets.numel():
        low, high = torch.stack(targets.aminmax()).tolist()
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"targets hold {low if low < 0 else high}, the vocabulary has ids 0 to "
                f"{vocab_size - 1}: mask or leave out the tokens that predict nothing, or give "
                "them any valid id"
            )


def check_count(**counts: int | None) -> None:
    """Require each to be None, or an integer of 1 or more."""
    for name, count in counts.items():
        if count is not None and (not isinstance(count, Integral) or count < 1):
            raise ValueError(f"{name} is {count!r}: it must be an integer, 1 or more")


def check_number(name: str, number: Any) -> None:
    """Require an int or a float, infinity included; kernels take no tensor in its place."""
    if not isinstance(number, Real) or math.isnan(number):
        raise ValueError(f"{name} is {number!r}: it must be a number")


def check_finite(name: str, number: Any) -> None:
    """Require an int or a float, and finite."""
    check_number(name, number)
    if math.isinf(number):
        raise ValueError(f"{name} is {number!r}: it must be finite")


def check_temperature(temperature: float) -> None:
    """Require a positive, finite number."""
    check_number("temperature", temperature)
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}: it must be positive and finite")


def check_tokens(num_tokens: int, **tensors: Tensor | None) -> None:
    """Require each to be None, or (num_tokens,)."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape != (num_tokens,):
            raise ValueError(f"{name} must be ({num_tokens},), got {tuple(tensor.shape)}")


def check_cu_seqlens(cu_seqlens: Tensor, num_tokens: int) -> None:
    """Require cu_seqlens (S + 1,): 0 and the sequences' ends in order, the last at `num_tokens`."""
    if cu_seqlens.dim() != 1 or not len(cu_seqlens) or cu_seqlens.is_floating_point():
        raise ValueError(
            f"cu_seqlens must be (sequences + 1,) integers, got {tuple(cu_seqlens.shape)} "
            f"{cu_seqlens.dtype}"
        )
    if _is_trusted.get():
        return
    borders = cu_seqlens.tolist()
    if borders[0] != 0 or borders[-1] != num_tokens or sorted(borders) != borders:
        excerpt = borders if len(borders) <= 6 else [*borders[:3], "…", *borders[-2:]]
        raise ValueError(
            f"cu_seqlens must rise from 0 to the number of tokens, {num_tokens}; got {excerpt}"
        )
