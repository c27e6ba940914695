"""What goes in: prompts and their truths, prompt templates, SFT examples, samplers over them."""
