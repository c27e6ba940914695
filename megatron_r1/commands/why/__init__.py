"""`megatron-r1 why`: why a run does not learn, by recomputing one of its steps (docs/why.md).

`recorded` reads what is left of the step. A module per family compares it (`files`, `sampling`,
`rewards`, `policies`, `loss`, `optimizer`, `push`) with the means of `formulas` and `replay`.
`finding` is what a check returns, `substitutions` what explains a departure, `page` writes
why.html, and `verb` chooses the step and prints the answer."""
