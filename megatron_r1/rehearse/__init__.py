"""Runs a recipe in miniature: the same structure with small sizes, on real trainer ranks and
engines (docs/rehearse.md). `miniature` divides it, with `layout`, `model`, `engine_sections`,
`rl_sections`, `data_sections` and `synthetic_data`, and `changes` lists what it changed; `launch`
starts its processes (`forked_ranks`: trainer ranks by fork; `null_gpu`: all of them on GPUs that
are imitated), `phases` has the phases from start to export (`check_export` checks that), and
`coverage` says what was exercised and what was not. `preflight` checks a cluster's nodes."""
