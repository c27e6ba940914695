"""Checkpoints of a run: what is in one, how it is written while training goes on, how it is trusted
again.

    finding.py    which folders are there, which is chosen, what is kept    pure Python
    manifest.py   size and checksum of every file                           pure Python
    series.py     the controller's part: save, learn the outcome, load      pure Python
    starting.py   the one that a run's first weights come from              pure Python
    contents.py   what a rank puts in and takes out
    gathering.py  the optimizer's shards put together
    host_memory.py  buffers that are kept between checkpoints
    staging.py    from there to copies in host memory, planned by Megatron
    files/__init__.py      one file, hashed as it is written
    writer.py     from there to a folder that is whole, in the background
    loading.py    verified by all ranks, then read at any parallel layout

docs/checkpoints.md describes the folder and what each kind of damage does.
"""
