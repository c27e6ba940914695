"""Guesses a recipe for a model folder and a data file, with reasons."""
