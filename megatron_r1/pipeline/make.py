"""The stage `make`: calls one Python function, `python -m megatron_r1.pipeline.make RECIPE.yaml`.

The function gets the stage's folder, where it writes what it likes, and its arguments by name. It
begins with an empty folder, so it need not know of attempts that were killed."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import yaml


def main(recipe: Path) -> None:
    """recipe: YAML of function, folder, arguments."""
    told = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    module, _, name = told["function"].partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    function = getattr(importlib.import_module(module), name)
    function(Path(told["folder"]), **told["arguments"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
