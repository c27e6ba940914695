"""Functions of the user's that a `sample` recipe names: a judge, or one that rewrites responses.

Each has the version of its module, under which its results are kept."""

import asyncio
import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_r1.base.errors import Cause, RunError, UserError
from megatron_r1.base.user_code import find_function, module_syntax


@dataclass(frozen=True)
class UserFunction:
    """A user's function that a recipe names.

    Attributes:
        path: "module:function".
        key: the recipe's key that names it.
        function: the function itself.
        identity: the path and a digest of its module; results of another version of the module have
            another identity."""

    path: str
    key: str
    function: Callable[..., Any]
    identity: tuple[str, str]

    async def __call__(self, *arguments: Any) -> Any:
        """Await a coroutine function; call any other in a thread, as it may wait for a network.

        Raises:
            RunError: the function raises an error.
        """
        try:
            if inspect.iscoroutinefunction(self.function):
                return await self.function(*arguments)
            return await asyncio.to_thread(self.function, *arguments)
        except Exception as error:
            raise RunError(
                f"{self.key}: {self.path} raised {error!r} for the question {arguments[0][:80]!r}; "
                "fix it, and run the same command again"
            ) from error


def load_function(path: str, key: str, arguments: str) -> UserFunction:
    """Import a function; modules are also found in the folder the command was started in.

    Args:
        path: "module:function".
        key: the recipe's key, for errors.
        arguments: their names, comma-separated.

    Raises:
        UserError: a path of another form, a module that cannot be imported, or a function with
            other parameters."""
    module, _, name = path.partition(":")
    if not (name.isidentifier() and all(part.isidentifier() for part in module.split("."))):
        raise UserError(
            f"{key}: {path!r} is not written as module:function", key=key, cause=Cause.MALFORMED
        )
    try:
        function = find_function(path)
    except UserError as error:
        raise UserError(f"{key}: {error}", key=key, cause=error.cause) from None
    except Exception as error:
        raise UserError(
            f"{key}: {module} cannot be imported: {error!r}", key=key, cause=Cause.FAILED
        ) from error
    try:
        inspect.signature(function).bind(*arguments.split(", "))
    except TypeError as error:
        raise UserError(
            f"{key}: {path} is called as {name}({arguments}): {error}",
            key=key,
            cause=Cause.MALFORMED,
        ) from None
    try:
        syntax = module_syntax(path)
    except ValueError:  # a compiled module has no source, and is taken to stay the same
        syntax = ""
    digest = hashlib.sha256(syntax.encode()).hexdigest()[:16]
    return UserFunction(path, key, function, (path, digest))
