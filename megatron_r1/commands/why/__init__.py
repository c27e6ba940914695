"""`megatron-r1 why`: why a run does not learn, by recomputing one of its steps (docs/why.md).

`step_reader` reads what is left of the step, `recorded_step`. A module per family compares it
(`files`, `sampling`, `engine_logprobs`, `rewards`, `policies`, `loss`, `optimizer`, `push`) with
what `formulas`, `policy_logprobs` and `recompute` make of it, of transformers' model
(`policy_model`) and `updates` of its own. Of an update, `update_inputs` is what it is made of,
`gradient_norms` what clipping tells of gradients that are not recomputed, `evidence` what the
checkpoint after it says. `comparison` is what a check returns, `substitutions` what explains a
departure, `page` writes why.html, and `verb` chooses the step and prints the answer."""
