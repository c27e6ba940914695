"""Sends this trainer rank's slices of the weights: planned by `plan`, carried by `transports`."""
