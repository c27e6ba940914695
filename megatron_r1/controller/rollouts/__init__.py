"""One rollout: `step_sampler` and `rollout` draw its questions and start them, `collector` has the
responses sampled, graded and grouped, `players` finds who plays an episode, and `metrics` and
`sample_log` record them; `heldout` answers held-out questions."""
