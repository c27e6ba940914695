"""A step's updates recomputed by formula, as the settings say or with a candidate cause in place.

- `update_inputs`: what the updates are made of; `loss_formulas` and `adam`: the formulas;
  `step_updates`: makes the updates; `first_update`: what all recomputations of a step have in
  common; `recomputation`: all of them for a step.
- `checkpoint_after`: what they are compared with; `run_differences`: how the run's differ.
- `candidate_cause`: one thing that may have been computed otherwise; `loss_causes`,
  `advantage_causes`, `sample_causes`, `optimizer_causes` and `fitted_causes`: those that are tried;
  `candidate_estimates`: which of them first.
- `moment_fits`: what the run's moments say of its gradients: how they were clipped, and by
  `term_coefficients` how often each of the `loss_terms` was added, by their `term_gradients`."""
