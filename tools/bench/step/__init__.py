"""The bench of whole RL steps: `speed` is `python tools/bench step`. It runs the two `systems` on
the same `work`, TRL through `peer_trl`; `compare` makes the comparison, and `critical_path` divides
the time of a step among those who were busy."""
