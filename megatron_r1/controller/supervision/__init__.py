"""Watches a run from its controller.

- `watched_run`: the run that is watched, and its progress.
- `hang_diagnosis`: what a hung run waits for, and the report.
- `watchdog`: notices hangs.
- `health`: the endpoints /health and /metrics.
- `supervisor`: runs the watchdog and these endpoints around a run, and restarts the trainer."""
