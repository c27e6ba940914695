"""What a list of patches of Megatron-Core is made of: `cpu_patches` has those for a CPU, `patches`
those for all platforms.

Imports no Megatron, because the patches for a CPU are installed before it is imported."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Patch:
    """What is done in place of one line of Megatron-Core.

    Attributes:
        name: a short description, unique among all patches.
        upstream: `file:symbol`, the file below `megatron/core` and the function that has the line,
            as of `platform.MEGATRON_VERSION`; without a symbol it is outside of functions.
        text: what the line contains. A test fails when it is gone.
        install: replaces Megatron's names."""

    name: str
    upstream: str
    text: str
    install: Callable[[], None]


Register = Callable[[Callable[[], None]], None]


def register_in(patches: list[Patch]) -> Callable[[str, str, str], Register]:
    """Return a decorator that appends the decorated function to `patches`; its arguments are the
    name, upstream and text of the `Patch`."""

    def patch(name: str, upstream: str, text: str) -> Register:
        return lambda install: patches.append(Patch(name, upstream, text, install))

    return patch
