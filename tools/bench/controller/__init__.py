"""The bench of the controller: a full rollout (`python tools/bench controller`), from synthetic
engines to synthetic trainer ranks (`synthetic`)."""
