"""A module per family of quantities, which compares what a step recorded with what it should be."""
