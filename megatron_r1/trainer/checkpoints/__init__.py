"""Checkpoints of a run: their content, writing them while training goes on, verifying and loading
them.

    finding.py      the checkpoints in a folder: choose, set aside, delete   no torch
    manifest.py     size and checksum of every file                          no torch
    contents.py     the tensors and states that a rank saves and restores
    adapters.py     the content of a checkpoint with model.lora, and its base model
    host_memory.py  buffers kept between checkpoints, where the optimizer's shards are gathered
    staging.py      copies the content into host memory, planned by Megatron
    writer.py       writes the copies in the background, each file hashed on its way
    loading.py      verifies with all ranks, then reads at any parallel layout

The controller's part, which asks for a save, awaits its outcome and asks for a load, is
`controller.run_recorder`. docs/checkpoints.md describes the folder and what
happens after each kind of damage."""
