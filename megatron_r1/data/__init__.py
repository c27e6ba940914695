"""Training data: prompts with truths, templates, SFT examples, preferences, samplers over them."""
