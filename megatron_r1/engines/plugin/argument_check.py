"""Parses engine arguments as vLLM's server does, in a process of its own.

`python -m megatron_r1.engines.plugin.argument_check` reads a JSON list of command-line words from
standard input, and writes one line of JSON: the names of all arguments, and the parser's error."""

import contextlib
import io
import json
import os
import sys
from typing import Any


def parse_engine_arguments(words: list[str]) -> dict[str, Any]:
    """Return the names of vLLM's arguments, and its error for `words`, "" where there is none."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.platforms import current_platform
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    # A login node has vLLM's CUDA build and no GPU, and no defaults can be made without a device
    # (config/device.py: `DeviceConfig.__post_init__`).
    if current_platform.is_unspecified():
        current_platform.device_type = "cuda"
    parser = make_arg_parser(FlexibleArgumentParser())
    options = [option for action in parser._actions for option in action.option_strings]
    names = sorted({option[2:].replace("-", "_") for option in options if option[:2] == "--"})
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            parsed_args = parser.parse_args(["--model", ".", *words])
            validate_parsed_serve_args(parsed_args)
            AsyncEngineArgs.from_cli_args(parsed_args)
        error = ""
    except SystemExit:
        # After the usage; pydantic's own messages have several lines.
        error = " ".join(stderr.getvalue().rpartition(": error: ")[2].split())
    except (ValueError, TypeError) as failure:  # pydantic's ValidationError is a ValueError
        error = " ".join(str(failure).split())
    except KeyError as failure:  # the name of an enumeration that does not exist
        error = f"it knows no {failure}"
    return {"names": names, "error": error}


def main() -> None:
    """Reply to standard output; what vLLM prints while it is imported goes to standard error."""
    words = json.loads(sys.stdin.read())
    reply = os.dup(1)
    os.dup2(2, 1)
    with os.fdopen(reply, "w") as out:
        json.dump(parse_engine_arguments(words), out)


if __name__ == "__main__":
    main()
