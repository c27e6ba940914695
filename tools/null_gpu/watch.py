"""Watches what processes on null GPUs wait for: `python tools/null_gpu/watch.py SEGMENT`.

It looks every second, and ends with the first circle, or wait for an ended rank, that it sees
twice."""

import sys
import time
from pathlib import Path


def main(segment: Path) -> None:
    from tools.null_gpu.wait_graph import find_stuck

    before = None
    while True:
        stuck = find_stuck(segment)
        if stuck and stuck == before:
            sys.exit(stuck)
        before = stuck
        time.sleep(1)


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    main(Path(sys.argv[1]))
