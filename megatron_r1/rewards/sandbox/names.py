"""The names that LiveCodeBench's harness imports before a program, such as `gcd` and `List`.

Its programs were written for sites that provide them. Here a name is imported only where a program
uses it: all modules together would take longer than most programs."""

import builtins
import functools
import importlib
import re

MODULES = (
    *("string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random"),
    *("statistics", "itertools", "functools", "operator", "io", "sys", "json", "typing"),
)
"""In the harness's order: `from … import *` of each, builtins again, then `import …` of each."""
IDENTIFIER = re.compile(r"[^\W\d]\w*")


@functools.cache
def exported() -> dict[str, str]:
    """Return name → the module that provides it."""
    found: dict[str, str] = {}
    for module in map(importlib.import_module, MODULES):
        names = getattr(module, "__all__", None) or vars(module)
        found |= {name: module.__name__ for name in names if not name.startswith("_")}
    found = {name: module for name, module in found.items() if not hasattr(builtins, name)}
    return found | {module: module for module in MODULES}


def names_in(source: str) -> dict[str, str]:
    """Return name → module for those names that may be used in `source`."""
    provided = exported()
    return {name: provided[name] for name in IDENTIFIER.findall(source) if name in provided}
