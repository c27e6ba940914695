"""What somebody who wrote an unknown name may have meant."""

import difflib
from collections.abc import Iterable


def did_you_mean(name: object, known: Iterable[str], form: str = "{!r}") -> str:
    """`; did you mean 'math'?` where one of `known` is near, nothing where none is: a guess at
    random sends people looking for a mistake they did not make. form: how the name is shown."""
    near = difflib.get_close_matches(str(name).lower(), list(known), n=1)
    return f"; did you mean {form.format(near[0])}?" if near else ""
