"""Weight transfer on one host: the trainer writes a safetensors file into shared memory, the engine
maps and reads it.

The bytes are copied twice: file -> layer in checkpoint form -> the live tensor in kernel form
(vLLM's layerwise reload, model_loader/reload/layerwise.py, which also refreshes MLA's absorbed
W_UK_T and W_UV). Views of the mapping live until `finish_weight_update`, so a file must not be
written again before then: one file per version.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from safetensors import SafetensorError, safe_open
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
    layerwise_groups,
)
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from megatron_r1.rollout.vllm_plugin.cpu_mends import forget_moe_kernels, repack_output_head


@dataclass
class SharedMemoryInit(WeightTransferInitInfo):
    """Nothing to agree on: every update names its own file."""


@dataclass
class SharedMemoryUpdate(WeightTransferUpdateInfo):
    path: str
    """A file in safetensors format under Hugging Face names, normally in /dev/shm."""
    num_bytes: int
    """Its size: a file still being written, or another one, is refused."""


class SharedMemoryEngine(WeightTransferEngine[SharedMemoryInit, SharedMemoryUpdate]):
    """vLLM weight-transfer backend `megatron_r1_shm`."""

    init_info_cls = SharedMemoryInit
    update_info_cls = SharedMemoryUpdate

    unfinished = False

    def init_transfer_engine(self, init_info: SharedMemoryInit) -> None:
        pass

    def start_weight_update(self) -> None:
        """Put every layer into its checkpoint form, waiting for weights."""
        if self.unfinished:  # an update failed half way: first back to kernel form
            finalize_layerwise_reload(self.model, self.model_config)
        forget_moe_kernels(self.model)
        distinct = {name for name, _ in self.model.named_parameters()}
        every = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        initialize_layerwise_reload(self.model)
        self.unfinished = True
        in_checkpoint_form = {name for name, _ in self.model.named_parameters()}
        self.missing = in_checkpoint_form - (every - distinct)  # a tied head comes as embedding

    def receive_weights(self, update_info: SharedMemoryUpdate) -> None:
        """Load the tensors of one file. A version may come in several files.

        Raises:
            ValueError: the file is absent, has another size, is not in safetensors format, or names
                a tensor that the model does not know.
        """
        loaded = self.model.load_weights(read_tensors(update_info))
        if not loaded:
            raise ValueError(f"{update_info.path} holds no tensor that the model knows")
        self.missing -= loaded

    def finish_weight_update(self) -> None:
        """Bring the new weights into kernel form and let go of the files.

        Raises:
            ValueError: the update was incomplete; the engine then holds a mixture and must not
                serve.
        """
        problems = sorted(self.missing) + partly_loaded(self.model)
        finalize_layerwise_reload(self.model, self.model_config)
        repack_output_head(self.model)
        self.unfinished, self.missing = False, set()
        if problems:
            shown = ", ".join(problems[:5]) + (", ..." if len(problems) > 5 else "")
            raise ValueError(f"the update left out {len(problems)} tensors of the model: {shown}")

    def shutdown(self) -> None:
        pass


def read_tensors(update: SharedMemoryUpdate) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, view into the mapped file), all tensors of a layer together, layers in order.

    That order lets vLLM finish a layer before the next begins: at most one layer is held twice.
    """
    if not os.path.exists(update.path):
        raise ValueError(f"the weights file {update.path} does not exist on this engine's host")
    if (size := os.path.getsize(update.path)) != update.num_bytes:
        raise ValueError(f"{update.path} has {size} bytes, announced were {update.num_bytes}")
    try:
        with safe_open(update.path, framework="pt") as file:
            for group in layerwise_groups(file.offset_keys()):
                for name in group:
                    yield name, file.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"{update.path} is not in safetensors format: {error}") from error


def partly_loaded(model: torch.nn.Module) -> list[str]:
    """Names of layers that got some of their elements but not all: a missing half of a fused
    tensor, or an expert.

    Call before finalize. Embeddings are exempt, as vLLM pads their rows.
    """
    names = []
    for name, layer in model.named_modules():
        layer_info = get_layerwise_info(layer)
        if not layer_info.can_load() or is_deferred_attention_layer(layer):
            continue
        exempt = isinstance(layer, VocabParallelEmbedding)
        if 0 < layer_info.load_numel < layer_info.load_numel_total and not exempt:
            names.append(name)
    return names
