"""Settings of `rl` that correct the training of any algorithm: one module each, whose docstring is
its definition, with its source.

They change what an algorithm is given, not the algorithm: the rewards that it normalizes, the
responses and tokens whose policy gradient counts, an estimate in its loss. Each has a default that
leaves everything as it is."""
