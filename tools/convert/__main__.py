"""`python tools/convert VERB …`: see megatron_r1/commands/convert/verb.py."""

import sys
from pathlib import Path

# Not in worker processes, which import this file under another name.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    from megatron_r1.commands.convert.verb import main

    sys.exit(main())
