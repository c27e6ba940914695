"""The process of a stage `make`: `python -m megatron_r1.pipeline.function_stage RECIPE.yaml` calls
one Python function.

The function gets the stage's folder, where it writes its files, and its arguments by name. The
folder is empty: files of attempts that were killed are removed before."""

import sys
from pathlib import Path

from megatron_r1.base.user_code import find_function
from megatron_r1.config.yaml_text import parse_value


def main(recipe: Path) -> None:
    """Call the function.

    Args:
        recipe: a YAML file with `function`, `folder` and `arguments`."""
    call = parse_value(recipe.read_text(encoding="utf-8"))
    function = find_function(call["function"])
    function(Path(call["folder"]), **call["arguments"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
