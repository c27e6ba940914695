"""The study of corrections: its cells, their runs, the figures over seeds and the comparison, which
is `python tools/bench corrections`."""
