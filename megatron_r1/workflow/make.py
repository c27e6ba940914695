"""The stage `make`: calls one Python function, `python -m megatron_r1.workflow.make RECIPE.yaml`.

The function gets the stage's folder, where it writes what it likes, and its arguments by name. It
begins with an empty folder, so it need not know of attempts that were killed."""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

from megatron_r1.user_code import find_function


def main(recipe: Path) -> None:
    """recipe: YAML of function, folder, arguments."""
    told = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    function = find_function(told["function"])
    function(Path(told["folder"]), **told["arguments"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
