"""A function of the user's own, named in a recipe as "module:function"."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_r1.user_code import find_function, syntax_of


@dataclass(frozen=True)
class UserFunction:
    """path: "module:function"; key: of the recipe that names it; identity: path and a digest of its
    module, which tell whether a result of another day is still its own."""

    path: str
    key: str
    function: Callable[..., Any]
    identity: tuple[str, str]

    async def __call__(self, *arguments: Any) -> Any:
        """Its result, awaited where it is a coroutine's; in a thread otherwise, as it may wait for
        a network. Raises RuntimeError for whatever it raises."""
        try:
            if inspect.iscoroutinefunction(self.function):
                return await self.function(*arguments)
            return await asyncio.to_thread(self.function, *arguments)
        except Exception as error:
            raise RuntimeError(
                f"{self.key}: {self.path} raised {error!r} for the question {arguments[0][:80]!r}; "
                "mend it, and run the same command again"
            ) from error


def load_function(path: str, key: str, arguments: str) -> UserFunction:
    """key: of the recipe; arguments: what it is called with, both for errors.

    Modules are found from the folder the command was started in. Raises ValueError for a path that
    is none, a module that cannot be imported, and what cannot be called with so many arguments.
    """
    module, _, name = path.partition(":")
    if not (name.isidentifier() and all(part.isidentifier() for part in module.split("."))):
        raise ValueError(f"{key}: {path!r} is not written as module:function")
    try:
        function = find_function(path)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
    except Exception as error:
        raise ValueError(f"{key}: {module} cannot be imported: {error!r}") from error
    try:
        inspect.signature(function).bind(*arguments.split(", "))
    except TypeError as error:
        raise ValueError(f"{key}: {path} is called as {name}({arguments}): {error}") from None
    try:
        syntax = syntax_of(path)
    except ValueError:  # compiled: it does not change with the day
        syntax = ""
    digest = hashlib.sha256(syntax.encode()).hexdigest()[:16]
    return UserFunction(path, key, function, (path, digest))
