"""One rollout: questions are drawn, responses sampled, graded and grouped, and written to the
sample log; and the answers to held-out questions."""
