"""Watches a run from its controller: `watchdog` notices hangs, `diagnosis` says what
hangs, and `supervisor` answers requests for the run's health and starts it again after a fault."""
