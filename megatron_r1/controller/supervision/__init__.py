"""Watches a run from its controller.

- `hang_diagnosis`: what a hung run waits for, and the report.
- `watchdog`: notices hangs.
- `supervisor`: runs the watchdog and the endpoints /health and /metrics around a run, and restarts
  the trainer."""
