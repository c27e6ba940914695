"""One patch of Megatron-Core, and the lists that they stand in: `cpu_patches` for the CPU,
`models.patches` for the models."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Patch:
    """What is done in place of one line of Megatron-Core.

    upstream: `file:symbol`, the file below `megatron/core` and the function that has the line, as
    of `versions.MEGATRON_VERSION`; without a symbol it is outside of functions. text: what the line
    contains. A test fails when it is gone."""

    name: str
    upstream: str
    text: str
    install: Callable[[], None]


Register = Callable[[Callable[[], None]], None]


def listed_in(patches: list[Patch]) -> Callable[[str, str, str], Register]:
    """Return a decorator that appends the decorated function to `patches`; its arguments are the
    name, upstream and text of the `Patch`."""

    def patch(name: str, upstream: str, text: str) -> Register:
        return lambda install: patches.append(Patch(name, upstream, text, install))

    return patch
