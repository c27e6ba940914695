"""Log-probabilities of a step computed again on the weights before it, by a fresh engine and by one
trainer rank. Each says on which side a departure from transformers is."""
