"""The primitives, each twice: as a Triton kernel in `<stem>_triton.py` and, with the same name and
signature, in plain PyTorch in `<stem>_torch.py`. `r1_kernels.registry` lists them. `rows_triton`
has what the Triton kernels over rows of logits share.

A Triton file holds, in this order: the design, the constants with what chose them, the kernels, and
the launchers. What calls them - checks of a user's arguments, chunking, the all-gather of a spread
vocabulary, autograd.Function - is written once over either backend, in the modules above this one.
Deterministic: no atomics, and every sum has one order."""
