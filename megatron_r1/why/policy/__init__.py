"""The policy in transformers: models of checkpoints, and what they make of logged tokens."""
