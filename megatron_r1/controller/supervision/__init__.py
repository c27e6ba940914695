"""Watches a run from its controller.

- `diagnosis`: what a hung run waits for, and the report.
- `watchdog`: notices hangs.
- `health`: the endpoints /health and /metrics.
- `supervisor`: runs the watchdog and the endpoints around a run, and restarts the trainer."""
