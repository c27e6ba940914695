"""Decodes what a trainer rank replied into the class that the called operation returns."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar, cast, get_type_hints

import msgspec

from megatron_r1.base.errors import TrainerError

R = TypeVar("R")


def decode_result(operation: Callable[..., R], rank: int, result: dict[str, Any]) -> R:
    """Return the result of an operation with the class that the operation returns; one that returns
    a dict is not checked.

    Args:
        operation: a method of the protocols.
        rank: the rank that replied.
        result: `RankReply.result`.

    Raises:
        TrainerError: a field is missing or of another type."""
    kind = _returned_type(operation)
    if not (isinstance(kind, type) and issubclass(kind, msgspec.Struct)):
        return cast(R, result)
    try:
        return cast(R, msgspec.convert(result, kind))
    except msgspec.ValidationError as error:
        raise TrainerError(
            f"trainer rank {rank}: its reply to {operation.__name__} is no {kind.__name__}: {error}"
        ) from error


@cache
def _returned_type(operation: Callable[..., Any]) -> Any:
    return get_type_hints(operation)["return"]
