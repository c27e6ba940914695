"""`python tools/faults [options]`: see tools/faults/command.py."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    from tools.faults.command import main

    sys.exit(main())
