"""Why a run does not learn, by recomputing one of its steps: `megatron-r1 why` (docs/why.md).

- `record` reads what a run keeps of a step.
- `all_checks` examines the step: it makes all checks, a module per kind of quantity in `checks`. A
  check compares what was logged with what transformers' model (`policy`), updates by formula
  (`update`), reruns (`rerun`) and plain numbers (`formulas`) give.
- `comparison` is the result of a check, `step_report` all of a step, and `page` writes why.html.
- `suspicions` finds figures worth a look where nothing departs.

The words that all modules use:

- A quantity departs where its comparison is beyond the tolerance.
- A candidate cause is what may have made it depart. Each is tried: what was logged is computed with
  it in place. The cause is the candidate that explains the departure, which then is no more than
  rounding; the others were tried in vain, or are untried.
- A remedy is what to change.
- A suspicion is not a cause: nothing departs, and no computation shows it."""
