"""`python tools/plan RECIPE.yaml … [options]`: see tools/plan/command.py."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    from tools.plan.command import main

    sys.exit(main())
