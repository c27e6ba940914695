"""Evaluation on benchmarks, and the loop that samples and grades responses.

- The loop: `sampling`, of `prompt_sets` (`benchmarks`), by an `engine_model` or a `remote_model`;
  `response`, `text_response_grader`; `response_log` and `identity` let it resume.
- Numbers: `summary`, `estimates` and `fraction_intervals` with intervals, `voting`, `win_rates`.
- For people: `evaluation_report`, `evaluation_plot`.
- What judges: `score_reliability` of reward models, `verifier_errors` of verifiers
  by `second_verdicts`.
- The model's folder: `model_folder`."""
