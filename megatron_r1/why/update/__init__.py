"""A step's updates recomputed by formula, as the settings say or with one thing substituted.

- `update_inputs`: what the updates are made of; `loss_formulas` and `adam`: the formulas;
  `step_updates`: makes the updates; `checkpoint_after`: what they are compared with, and what it
  says of how they differ; `recomputation`: all of them for a step.
- `step_substitution`: one thing that may have been computed otherwise; `substitution_candidates`:
  all of them, `advantage_substitutions` for advantages; `substitution_estimates`: which are tried
  first.
- `moment_fits`: what the run's moments say of its gradients: how they were clipped, and by
  `term_coefficients` how often each of the `loss_terms` was added."""
