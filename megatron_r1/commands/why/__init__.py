"""`megatron-r1 why`: why a run does not learn, by recomputing one of its steps. `recorded` reads
what is left of the step, a module per family compares it (`files`, `sampling`, `rewards`, `loss`,
`optimizer`) with the means of `formulas` and `replay`, `finding` is what a check returns, `page`
writes why.html, and `verb` chooses the step and prints the answer ([why](docs/why.md))."""
