"""Watches a run from its controller.

- `run_roles`: the roles of a run, and their progress.
- `hang_diagnosis`: what a hung run waits for, and the report.
- `watchdog`: notices hangs.
- `health`: the endpoints /health and /metrics.
- `supervisor`: runs the watchdog and these endpoints around a run, and restarts the trainer."""
