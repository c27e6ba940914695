"""Checks of nodes, links and files before a long run (docs/preflight.md).

- `rank`: measures on every rank.
- `node_probes`: the node, and its connection to rank 0's, with its clock.
- `folder`: the run folder.
- `links`: the collectives of the parallel axes, and the links between nodes.
- `rank_placement`: where a rank is.
- `compilers`: one kernel by each that the run needs, on GPUs.
- `facts`: the measurements, as ranks send them to rank 0.
- `rank_progress`: names the rank that the others wait for.
- `findings`: compares the ranks with each other and the planner (`node_checks`, `cuda_checks`,
  `rate_checks`, each with a `check_result`), prints the table and writes the results' files."""
