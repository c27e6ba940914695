"""`python tools/bench WHAT [options]`: see tools/bench/command.py."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Replaces this folder, whose names (kernels, step, ...) would hide other packages.
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    from tools.bench.command import main

    sys.exit(main())
