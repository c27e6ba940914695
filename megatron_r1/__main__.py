"""`python -m megatron_r1 …` is `megatron-r1 …`."""

import sys

from megatron_r1.commands.cli import main

sys.exit(main())
