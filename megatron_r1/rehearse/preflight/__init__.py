"""Checks of nodes, links and files before a long run (docs/preflight.md): `rank` measures on every
rank, `host` the node and the run folder, `links` the collectives of the parallel axes and the links
between nodes; `exchange` brings the measurements to rank 0, and `judge` compares the ranks with
each other and with the planner."""
