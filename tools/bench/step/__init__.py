"""The bench of whole RL steps: `speed` is `python tools/bench step`. It makes the `runs` of the two
`systems` on the same `work` in `cases`, TRL through `peer_trl`; `figures` and `page` compare them.
`other_modes` does without TRL: `critical_path` divides the time of a step among those who were
busy."""
