"""Commands as a graph of stages: which are done or stale, and running the others."""
