"""Several rollout engines: dispatch, retries, replacement, and engines on other hosts."""
