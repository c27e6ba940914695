"""Training data from a model's responses: `selection` keeps some (rejection sampling), `filters`
name reasons against a response, `decontamination` finds questions of benchmarks, `judged` has
preference pairs and safety labels, and `outputs` and `sft_examples` write the files."""
