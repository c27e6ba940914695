"""Asserting which mistake was refused, not in which words."""

import contextlib
from collections.abc import Iterator

import pytest

from megatron_r1.base.errors import Cause, UserError


@contextlib.contextmanager
def refused(key: str, cause: Cause, *values: object) -> Iterator[pytest.ExceptionInfo[UserError]]:
    """Assert that the block raises a `UserError` of that key and cause.

    values: names, numbers and paths that the message must show, such as the wrong value."""
    with pytest.raises(UserError) as caught:
        yield caught
    error = caught.value
    assert (error.key, error.cause) == (key, cause), f"{error.key}, {error.cause}: {error}"
    missing = [str(value) for value in values if str(value) not in str(error)]
    assert not missing, f"the message does not show {missing}: {error}"


@contextlib.contextmanager
def raised(kind: type[Exception], *values: object) -> Iterator[pytest.ExceptionInfo[Exception]]:
    """Assert that the block raises an exception of that class whose message shows `values`: names,
    numbers and paths."""
    with pytest.raises(kind) as caught:
        yield caught
    missing = [str(value) for value in values if str(value) not in str(caught.value)]
    assert not missing, f"the message does not show {missing}: {caught.value}"
