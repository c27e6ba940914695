"""Training data from a model's responses: `selection` keeps some (rejection sampling), `filters`
name reasons against a response, `decontamination` finds questions of benchmarks, `judge` has the
judges of `judged_rows`, `sft_examples` has the rows of `sft`, `outputs`
writes the files."""
