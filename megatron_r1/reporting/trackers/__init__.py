"""Trackers of a run's figures: TensorBoard's files, and the services of `run.trackers`."""
