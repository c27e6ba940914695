"""What FP8 does to the loss: the variants and their comparison (`python tools/bench fp8`), a
training run of one, and the model's config.json."""
