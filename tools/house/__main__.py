"""Measures the structure of the code: `python tools/house [--walks [--section.key value …]]`.

Prints the packages, their layers and the imports between them, files and lines, what one command
needs (every project file that `megatron-r1 rl` can import in its three roles), and words and lines
of docs and tests. Where the model of `make demo` is there, it also runs one step of the laptop
recipe and prints, of three things that pass through the code, the files that carry them between two
functions, in order. --walks does so with further settings of the recipe, as `--model.path FOLDER`.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODEL = "runs/demo/base/hf"
"""The model of `make demo`, which the laptop recipe trains."""

if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    from tools.house.structure import table
    from tools.house.walks import __doc__ as definition
    from tools.house.walks import walks

    parser = argparse.ArgumentParser(
        prog="tools/house",
        description=__doc__,
        epilog=definition,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--walks", action="store_true", help="trace a run with further settings")
    arguments, settings = parser.parse_known_args()
    if settings and not arguments.walks:
        parser.error(f"settings are for --walks: {' '.join(settings)}")
    print(table(ROOT))
    if arguments.walks or (ROOT / MODEL).exists():
        print(walks(ROOT, settings))
    else:
        print(f"walks                    not traced: {MODEL} is not there (make demo)")
