"""Training data from a model's responses: rejection sampling, preference pairs, safety labels."""
