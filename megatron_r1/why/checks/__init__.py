"""The checks of a step: each compares what was recorded with what it should be.

- Files: `files` with `prompt_tokens`, `questions`.
- Sampling: `sampling` with `draws`, `routing`, `engine_logprobs` with `engine_gaps`; candidate
  causes of a gap: `engine_causes`, `tensor_causes` by `tensor_groups`, `expert_causes`,
  `fp8_causes`.
- Rewards: `rewards` with `regraded_rewards` and `second_reader`.
- Updates: `schedule`, `trainer_logprobs` with `reference_weights`, `loss`, `optimizer`,
  `checkpoints`, `push`; their tolerances: `update_tolerances`; candidate causes of a departure:
  `cause_search` for whole updates, `departing_terms` for terms of the loss.
- `reruns`: which side a departure is on."""
