"""Episodes of several turns: token trees, environments with tools, the loop that plays them.

docs/agents.md describes them for users."""
