"""The mask of `rl.engine_mask`: its settings, and the bounds that each method allows.

Its mathematics is in `controller/corrections`."""

from dataclasses import dataclass
from math import inf
from typing import Literal

from megatron_r1.base.errors import Cause, UserError

EngineMaskMethod = Literal["none", "token", "sequence", "divergence"]


@dataclass(frozen=True)
class EngineMaskSettings:
    """Which tokens have no policy gradient because engine and trainer disagree about them.

    Attributes:
        method: "token", "sequence" or "divergence", a module of `controller/corrections` each;
            "none": every token has one.
        low: the smallest ratio π_old / π_engine that is kept (token, sequence), or the largest fall
            of a probability (divergence).
        high: the largest ratio, or the largest rise of a probability."""

    method: EngineMaskMethod = "none"
    low: float = 0.0
    high: float = inf


BOUNDS = {"token": (0.5, 5.0), "sequence": (0.999, 1.001), "divergence": (0.15, 0.15)}
"""low and high of each method where a recipe leaves them out: those of its source."""


def make_engine_mask_settings(
    method: EngineMaskMethod, low: float | None, high: float | None, ratio_level: str
) -> EngineMaskSettings:
    """Return the mask that a recipe's settings describe.

    Args:
        method: `rl.engine_mask`.
        low: `rl.engine_mask_low`; None: the method's own.
        high: `rl.engine_mask_high`; None: the method's own.
        ratio_level: `rl.ratio_level`.

    Raises:
        UserError: bounds without a method, bounds that the method cannot have, and a mask of single
            tokens where a response has one ratio."""
    given_bounds = {"rl.engine_mask_low": low, "rl.engine_mask_high": high}
    if method == "none":
        for key, value in given_bounds.items():
            if value is not None:
                raise UserError(
                    f"{key}: {value:g} bounds nothing, because rl.engine_mask is none; set that to "
                    f"{', '.join(BOUNDS)}, or leave the bound out",
                    key=key,
                    cause=Cause.CONFLICT,
                )
        return EngineMaskSettings()
    if method != "sequence" and ratio_level == "sequence":
        raise UserError(
            f"rl.engine_mask: {method} leaves out single tokens, and with rl.ratio_level: sequence "
            "all tokens of a response share one ratio and its gradient; use sequence",
            key="rl.engine_mask",
            cause=Cause.CONFLICT,
        )
    bounds = tuple(
        default if value is None else value
        for default, value in zip(BOUNDS[method], (low, high), strict=True)
    )
    if method == "divergence":
        allowed_ranges = ((0.0, 1.0), (0.0, 1.0))
        meaning = "a difference of two probabilities, above 0 and at most 1"
    else:
        allowed_ranges = ((-inf, 1.0), (1.0 - 2**-30, inf))
        meaning = "ratios on either side of 1, at which engine and trainer agree"
    for (key, value), bound, (minimum, maximum) in zip(
        given_bounds.items(), bounds, allowed_ranges, strict=True
    ):
        if not minimum < bound <= maximum:
            raise UserError(
                f"{key}: {value:g}: the bounds of rl.engine_mask: {method} are {meaning}",
                key=key,
                cause=Cause.OUT_OF_RANGE,
            )
    return EngineMaskSettings(method, *bounds)
