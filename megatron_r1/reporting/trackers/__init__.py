"""Trackers besides TensorBoard: a run's figures in Weights & Biases and in MLflow, by their own
libraries, which are imported when a recipe names them in `run.trackers`."""

from megatron_r1.reporting.trackers.tracker_set import TrackerSet, check_trackers
