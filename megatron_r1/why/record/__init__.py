"""What a run keeps of a step: settings, metrics, finished groups and checkpoints."""
