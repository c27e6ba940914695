"""Where an engine rank's new weights land before they go live, and how both sides speak of it.

The engine rank finds out what it needs from vLLM's own loaders (vllm_plugin/recorder.py)
and publishes it as a `Table`: memory of `num_bytes` and, for every rectangle of a Hugging Face
tensor that it wants, where in that memory it goes. Trainer ranks answer with the `Delivery`s that
each will make, and with every push send the bytes of those and one checksum each. Nothing here
knows a transport, a model or a parallel layout.

Imports torch, msgspec, llvmlite and xxhash: it runs in the trainer and inside vLLM.
"""

from megatron_r1.weight_sync.receive.coverage import check_coverage
from megatron_r1.weight_sync.receive.table import Delivery, Slot, Table
from megatron_r1.weight_sync.verify.checksum import checksum, copy_with_checksum

__all__ = ["Delivery", "Slot", "Table", "check_coverage", "checksum", "copy_with_checksum"]
