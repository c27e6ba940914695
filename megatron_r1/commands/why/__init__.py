"""`megatron-r1 why`: why a run does not learn, by recomputing one of its steps (docs/why.md).

`recorded` reads what is left of the step. A module per family compares it (`files`, `sampling`,
`rewards`, `policies`, `loss`, `optimizer`, `push`) with what `formulas`, `policy_logprobs` and
`recompute` make of it, of transformers' model (`policy_model`) and `updates` of its own.
`comparison` is what a check returns, `substitutions` what explains a departure, `page` writes
why.html, and `verb` chooses the step and prints the answer."""
