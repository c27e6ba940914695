"""A step's updates made again by formula, as the settings say or with one thing substituted.

`update_inputs` is what they are made of, `loss_formulas` and `adam` are the formulas,
`step_updates` makes the updates, `checkpoint_after` is what they are compared with, and
`recomputation` has all of them for a step. `substitutions` is what may have been computed
otherwise, `advantage_substitutions` of it what is of advantages; `evidence` is what the checkpoint
after the step says of that, and `substitution_estimates` which of them are tried first.
`moment_fits` is what the run's moments say of its gradients: `gradient_norms` by how they were
clipped, `term_coefficients` by how often each of `loss_terms` was added, of which `term_gradients`
are the gradients."""
