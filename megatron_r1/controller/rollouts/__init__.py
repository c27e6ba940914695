"""One rollout, from its prompts to its record.

- `step_sampler`: draws a step's prompts and has them sampled, some steps ahead, and replaces groups
  with equal rewards; `rollout_stream` starts them.
- `collector`: has responses sampled, graded and grouped, and their log-probabilities computed by
  their question's teacher; `in_flight` tracks the groups that are not finished.
- `teacher_fleets`: the engines that compute log-probabilities for each source's questions.
- `players`: finds who plays an episode.
- `rollout`: groups and graded responses; `response_grader` grades them, `training_samples` turns
  them into the trainer's samples.
- `metrics`, `sample_log` with `group_records`: what is kept of them.
- `heldout`: answers held-out prompts."""
