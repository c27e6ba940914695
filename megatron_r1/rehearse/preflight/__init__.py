"""Checks of nodes, links and files before a long run (docs/preflight.md).

- `rank`: measures on every rank.
- `host`: the node and the run folder.
- `links`: the collectives of the parallel axes, and the links between nodes.
- `exchange`: brings the measurements to rank 0.
- `findings`: compares the ranks with each other and with the planner.
- `report`: the table, and the files of the result."""
