"""A step's updates made again by formula, as the settings say or with one thing substituted.

`update_inputs` is what they are made of, `loss_formulas` and `adam` are the formulas,
`step_updates` makes the updates, and `recomputation` compares them with the run's. `substitutions`
is what may have been computed otherwise, `advantage_substitutions` of it what is of advantages;
`evidence` is what the checkpoint after the step says of that, and `gradient_norms` what clipping
says of gradients that are not recomputed. `loss_terms` are the terms of the loss, `term_gradients`
their gradients, and `term_coefficients` how often the run has added each."""
