"""Trackers of a run's figures: `TrackerSet` sends these to the trackers that a recipe names in
`run.trackers` (`wandb_tracker`, `mlflow_tracker`), to each from a thread of its own
(`background_tracker`). `tensorboard_log` writes the run's own event files.

A tracker's library is imported when a recipe names it."""

from megatron_r1.reporting.trackers.tracker_set import TrackerSet, check_trackers
