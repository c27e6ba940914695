"""Stands before `inside_call.py` and `inside_script.py` where the program has names provided, after
a line `NAMES = {name: module, …}` (names.py)."""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import CodeType

NAMES: dict[str, str] = globals().get("NAMES", {})


def provide_names(code: "CodeType", namespace: dict) -> None:
    """Import those of `NAMES` that `code` uses, into its `namespace`."""
    used: set[str] = set()
    pending = [code]
    while pending:
        block = pending.pop()
        used.update(block.co_names)
        pending += [part for part in block.co_consts if isinstance(part, type(code))]
    for name in used.intersection(NAMES):
        module = __import__(NAMES[name])
        # Another version of Python may lack the name.
        value = module if name == NAMES[name] else getattr(module, name, None)
        if value is not None:
            namespace[name] = value
