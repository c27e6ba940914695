"""A recipe for a model folder and a data file: what it guesses, with reasons."""
