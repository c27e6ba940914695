"""The primitives, each twice: as a Triton kernel and in plain PyTorch, by the same name.

Both have one signature, in `<stem>_triton.py` and `<stem>_torch.py`. `r1_kernels.registry` lists
them. `rows_triton` has what the Triton kernels over rows of logits share.

A Triton file holds, in this order: the design, the constants with what chose them, the kernels, and
the launchers. What calls them - checks of a user's arguments, chunking, the all-gather of a spread
vocabulary, autograd.Function - is written once over either backend, in the modules above this one.
Deterministic: no atomics, and every sum has one order.

**Constants by registers, untimed**: block sizes, loads and warps are chosen from the registers and
instructions of the kernels as Triton 3.9.0 (requirements/cpu.lock) compiles them, for sm_90 unless
a table says otherwise. No alternative has been timed on a GPU, and none in a table spills. The aim
is 29 kB in flight per SM: 4.8 TB/s x 0.8 us / 132 SMs of an H200. docs/kernels.md has the list, and
`python tools/bench kernels --sweep` times the alternatives."""
