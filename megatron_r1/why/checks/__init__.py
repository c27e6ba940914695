"""A module per family of the step, which compares what a step recorded with what it should be."""
