"""`python tools/bench WHAT [options]`: see tools/bench/command.py."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Replaces this folder, whose names (kernels, step, ...) would hide other packages.
    root = Path(__file__).resolve().parents[2]
    # The kernels too: torch, Triton and numpy are enough to time them.
    sys.path[:1] = [str(root), str(root / "kernels")]
    from tools.bench.command import main

    sys.exit(main())
