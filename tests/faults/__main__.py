"""`python tests/faults [options]`: see tests/faults/command.py."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    from tests.faults.command import main

    sys.exit(main())
