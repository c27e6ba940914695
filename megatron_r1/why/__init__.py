"""Why a run does not learn, by recomputing one of its steps: `megatron-r1 why` (docs/why.md).

`record` reads what a run keeps of a step. `examination` makes the checks, a module per kind of
quantity in `checks`: what was logged is compared with what transformers' model (`policy`), the
updates by formula (`update`) and plain numbers (`formulas`) give. `comparison` is what a check
returns, `suspicions` is what is left where nothing departs, and `page` writes why.html."""
