"""Trackers of a run's figures: `tracker_set` sends them, each line once, to `services`."""
