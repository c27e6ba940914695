"""The output of a run for people: its folder, the live view, trackers and the report."""
