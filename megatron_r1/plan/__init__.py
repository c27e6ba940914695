"""What a run needs before a GPU is rented: parameters, memory of every rank, traffic, operations
and time of a recipe, each with its formula (docs/plan.md). `megatron-r1 plan` prints them."""
