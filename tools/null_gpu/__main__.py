"""`python tools/null_gpu --gpus 2 -m pytest tests/gpu`: see tools/null_gpu/launch.py."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent

if __name__ == "__main__":
    sys.path[0] = str(HERE.parents[1])
    from tools.null_gpu.launch import main

    sys.exit(main(sys.argv[1:]))
