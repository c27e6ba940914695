"""The order of a GPU's streams in an update with the experts' exchange overlapped:
`exchange_streams.py FOLDER GRID`. Fails where memory of two streams is used out of order, and where
the check does not notice that no stream waits any more."""

import sys
from pathlib import Path

from checked_streams import Event, Streams
from exchange_steps import CASES, config, updated

from megatron_r1.trainer import distributed


def main() -> None:
    folder, grid, *cases = sys.argv[1:]
    first = config(Path(folder) / "deepseek", grid, {}, "float32")
    grid_position = distributed.initialize(first.parallel, seed=0)
    Streams.install()
    for case in cases:
        model, changes = CASES[case]
        settings = config(Path(folder) / model, grid, changes, "float32")
        with Streams() as streams:
            updated(settings, grid_position, switched=True)
        # Of computation, of communication, and of what the host reads (Megatron's dispatcher).
        counts = sorted(streams.operations.values())
        assert len(counts) == 3 and counts[0] > 50, f"{case}: operations of streams: {counts}"
        assert not streams.races, f"{case}: {len(streams.races)}, {sorted(set(streams.races))[:9]}"
        if grid_position.rank == 0:
            print(f"{case} is in order, {counts} operations", flush=True)
    Event.waits = False
    with Streams() as streams:
        updated(settings, grid_position, switched=True)
    assert streams.races, "no stream waits, and the check has not noticed"
    if grid_position.rank == 0:
        print(f"without waiting {len(streams.races)} are not", flush=True)
    distributed.leave_process_groups()


if __name__ == "__main__":
    main()
