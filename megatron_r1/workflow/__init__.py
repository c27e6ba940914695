"""R1's stages as a graph: what is done, what is stale, and running the rest."""
