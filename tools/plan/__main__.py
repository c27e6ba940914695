"""`python tools/plan RECIPE.yaml … [options]`: see megatron_r1/commands/plan.py."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    from megatron_r1.commands.plan import main

    sys.exit(main())
