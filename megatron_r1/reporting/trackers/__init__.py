"""Trackers of a run's metrics, whose libraries are imported when a recipe names them.

- `tracker_set`: sends the metrics to those that `run.trackers` names, to each from a thread of its
  own (`background_tracker`).
- `tracker`: what each is, `wandb_tracker` and `mlflow_tracker`.
- `tensorboard_log`: the run's own event files."""
