"""What a run keeps of a step: settings, metrics, finished groups and checkpoints.

`examinable_steps` says which steps a run's folder has, `step_reader` makes of one a `recorded_step`
with its `step_sequences`."""
