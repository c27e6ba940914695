"""Training data from a model's responses: `selection` keeps some (rejection sampling) and writes
the files, `filters` name reasons against a response, `judge` has judges and the rows that they
decide, `sft_examples` has the rows of `sft`."""
