"""A run under injected faults, which is `python tools/bench chaos` (`disturbed_run`): the `faults`,
the `user` who starts the command again, and the `oracle` that finds what they broke."""
