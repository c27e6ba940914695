"""Trackers of a run's figures: `TrackerSet` sends these to the trackers that a recipe names in
`run.trackers`, which are in `services`, each from a thread of its own (`background_tracker`).

A tracker's library is imported when a recipe names it."""

from megatron_r1.reporting.trackers.tracker_set import TrackerSet, check_trackers
