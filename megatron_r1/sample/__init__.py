"""Training data from a model's responses.

`selection` keeps some (rejection sampling), `filters` name reasons against a response,
`response_judges` has judges, `preference_pairs` and `safety_labels` the rows that they decide,
`sft_examples` the rows of `sft`, `second_pass` writes the files, and `decontamination` finds
questions of benchmarks. `user_functions` loads users' judges and rewriters, whose results are in a
`result_cache`."""
