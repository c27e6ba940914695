"""The content of a checkpoint on one rank, as a tree of Megatron's sharded entries, and its reading
at any parallel layout, after all ranks together have verified it.

model            weights and persistent buffers of every model chunk of this rank, under the names
                 that Megatron's sharded_state_dict gives them
optimizer        fp32 master weights and both moments, whole per parameter (FORMAT)
optimizer_step   finished updates, for Adam's bias correction
reference        the reference policy, as "model" with names that begin with "reference."
critic           PPO's critic, as "model" with names that begin with "critic."; critic_optimizer and
                 critic_step as the policy's
rng              the random streams of every rank; restored at an equal layout only
layout           the layout that wrote them

With model.lora, "model", "reference" and "optimizer" hold adapters only, and base_fingerprint is
that of the model they belong to (`adapter_checkpoint`)."""

import contextlib
import gc
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedObject
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer import MegatronModule
from megatron.core.utils import unwrap_model
from torch.distributed.checkpoint.api import CheckpointException  # a BaseException

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.models import platform
from megatron_r1.models.build import process_groups
from megatron_r1.models.weights.adapters import has_adapters
from megatron_r1.trainer.checkpoints import adapter_checkpoint, manifest
from megatron_r1.trainer.checkpoints.adapter_checkpoint import BASE_FINGERPRINT_KEY, check_base
from megatron_r1.trainer.checkpoints.manifest import ManifestError, Verify
from megatron_r1.trainer.checkpoints.optimizer_gathering import gather_in_host_memory
from megatron_r1.trainer.checkpoints.staging import StagingBuffers
from megatron_r1.trainer.reference_policy import ReferencePolicy

FORMAT = "fully_reshardable"
"""Format of the distributed optimizer's state: whole moments per parameter, for any layout."""

REFERENCE_PREFIX, CRITIC_PREFIX = "reference.", "critic."
"""Prefixes of their tensors' names."""

Chunks = Sequence[MegatronModule]


class Network(NamedTuple):
    """What a checkpoint has of a `Trainer` or `Critic`: this rank's chunks and their optimizer."""

    chunks: Chunks
    optimizer: Any


class Networks(NamedTuple):
    """Everything on this rank that has weights.

    Attributes:
        policy: the trainer's own.
        reference: its reference; None: there is none.
        critic: PPO's critic; None: there is none."""

    policy: Network
    reference: ReferencePolicy | None = None
    critic: Network | None = None


def sharded_tree(networks: Networks, memory: StagingBuffers | None = None) -> dict[str, Any]:
    """Return the tree of this rank. Its tensors are the model's own: copy before either changes.

    Args:
        networks: the models and optimizers of the checkpoint.
        memory: where the optimizer's shards are gathered, for saving; None: for loading, only
            buffers of the right size are made."""
    (chunks, optimizer), reference, critic = networks
    weights = [_sharded_weights(chunk, "") for chunk in chunks]
    states, step = _optimizer_state(optimizer, weights, memory)
    tree = {"model": weights, "optimizer": states, "optimizer_step": step}
    if critic is not None:
        weights = [_sharded_weights(chunk, CRITIC_PREFIX) for chunk in critic.chunks]
        states, step = _optimizer_state(
            critic.optimizer, weights, memory, len(_optimizer_parts(optimizer))
        )
        tree |= {"critic": weights, "critic_optimizer": states, "critic_step": step}
    if memory is not None:
        tree |= {"layout": parallel_layout(chunks), "rng": _rng_entry(loading=False)}
        if has_adapters(chunks):
            tree[BASE_FINGERPRINT_KEY] = unwrap_model(chunks[0]).base_fingerprint
    if reference is not None:
        tree["reference"] = [_sharded_weights(chunk, REFERENCE_PREFIX) for chunk in chunks]
        for entry in (entry for entries in tree["reference"] for entry in entries.values()):
            # From where it is kept: next to engines, the GPU may have no room for a second set of
            # weights.
            entry.data = reference.stored_value(entry.data)
    return tree


def _optimizer_state(
    optimizer: Any, weights: list[dict[str, Any]], memory: StagingBuffers | None, first: int = 0
) -> tuple[list[dict[str, Any]], Any]:
    """Return the sharded state of an optimizer's parts, and its number of finished updates.

    Args:
        optimizer: Megatron's optimizer, which may be a chain of parts.
        weights: the entries of its model's chunks.
        memory: where its state is gathered; None: it is loaded.
        first: index of its first part among all optimizers that are gathered in `memory`."""
    _allocate_state(optimizer)
    kind = {"distrib_optim_sharding_type": FORMAT}
    # Parameters of all chunks belong to one optimizer, which finds them by identity.
    by_chunk, is_loading = dict(enumerate(weights)), memory is None
    states = []
    for index, part in enumerate(_optimizer_parts(optimizer), first):
        with gather_in_host_memory(part, index, memory), _little_to_collect():
            states.append(part.sharded_state_dict(by_chunk, is_loading=is_loading, metadata=kind))
    # Megatron keeps experts' state in an optimizer of its own in some layouts and not in others,
    # and its chained state records which. Tensors are named by their parameter; the only other
    # thing that has to survive is the step count, the same everywhere.
    step = states[0]["optimizer"]["param_groups"][0].get("step")
    param_states = [state["param_state"] for state in states]
    if is_loading:
        param_states = [
            _own_part(part, state)
            for part, state in zip(_optimizer_parts(optimizer), param_states, strict=True)
        ]
    return [{"param_state": state} for state in param_states], step


def _own_part(part: Any, state: dict[int, Any]) -> dict[int, Any]:
    """Drop optimizer entries that this data-parallel rank holds no state of, so that they are not
    read for nothing: each rank would read a whole model's state.

    Args:
        part: an optimizer.
        state: its entries by a parameter's place in all its buffers
            (`load_parameter_state_from_fully_reshardable`)."""
    is_owned = []
    for buffer, ranges in zip(part.buffers, part.gbuf_ranges, strict=True):
        (shards,) = ranges.values()
        owned_parameters = {parameter for shard in shards for parameter in shard["param_map"]}
        is_owned += [parameter in owned_parameters for parameter in buffer.param_index_map]
    return {place: entries for place, entries in state.items() if is_owned[place]}


def _restore_networks(loaded: dict[str, Any], networks: Networks) -> None:
    """Restore the model, the optimizer, the reference and the critic from the tree read."""
    policy, reference, critic = networks
    _load_weights(policy.chunks, loaded["model"], "")
    _load_optimizer(policy.optimizer, loaded["optimizer"], loaded["optimizer_step"])
    if critic is not None:
        _load_weights(critic.chunks, loaded["critic"], CRITIC_PREFIX)
        _load_optimizer(critic.optimizer, loaded["critic_optimizer"], loaded["critic_step"])
    if reference is not None:
        with reference.swapped_in():
            _load_weights(policy.chunks, loaded["reference"], REFERENCE_PREFIX)
            reference.refresh()


def _load_weights(chunks: Chunks, loaded: list[dict[str, Any]], prefix: str) -> None:
    load = adapter_checkpoint.load_adapters if has_adapters(chunks) else load_weights
    for chunk, weights in zip(chunks, loaded, strict=True):
        load(chunk, {name.removeprefix(prefix): t for name, t in weights.items()})


def load_weights(module: torch.nn.Module, weights: dict[str, Any]) -> None:
    """Load all of a module's weights and buffers; `_extra_state` entries may be missing.

    Every Transformer Engine module requires one, and checkpoints have none (`without_extra_state`).

    Raises:
        KeyError: any other name is missing or unknown.
    """
    names = module.load_state_dict(weights, strict=False)
    missing_names = [name for name in names.missing_keys if not _is_extra_state(name)]
    if missing_names or names.unexpected_keys:
        raise KeyError(f"missing: {missing_names[:5]}; unknown: {names.unexpected_keys[:5]}")


def without_extra_state(entries: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of a sharded state dict without Transformer Engine's extra states.

    They are filled by its delayed FP8 scaling only, and named by the number of shards: an empty one
    would tie the checkpoint to the layout that wrote it."""
    return {name: entry for name, entry in entries.items() if not _is_extra_state(name)}


def _is_extra_state(name: str) -> bool:
    return "_extra_state" in name


def _load_optimizer(optimizer: Any, states: list[dict[str, Any]], step: Any) -> None:
    for part, state in zip(_optimizer_parts(optimizer), states, strict=True):
        full_state = part.state_dict()
        for group in full_state["optimizer"]["param_groups"]:
            group["step"] = step
        part.load_state_dict({**full_state, **state, "param_state_sharding_type": FORMAT})
        _separate_steps(part.optimizer)


def parallel_layout(chunks: Chunks) -> dict[str, int]:
    """Return the sizes of the parallel axes: random streams carry over to an equal layout only."""
    groups = process_groups(chunks)
    return {
        "ranks": dist.get_world_size(),
        "tensor": groups.tp.size(),
        "pipeline": groups.pp.size(),
        "context": groups.cp.size(),
        "expert": groups.ep.size(),
        "expert_tensor": groups.expt_tp.size(),
        "chunks": len(chunks),
    }


def _rng_entry(loading: bool) -> ShardedObject:
    """Return this rank's random streams: torch's, the GPU's, Megatron's per tensor rank and
    Python's; an empty entry for loading."""
    streams: dict[str, Any] = {}
    if not loading:
        streams = {
            "torch": torch.get_rng_state(),
            "cuda": platform.rng_state(),
            "megatron": get_cuda_rng_tracker().get_states(),
            "python": random.getstate(),
        }
    return ShardedObject("rng", streams, (dist.get_world_size(),), (dist.get_rank(),))


def _restore_rng(streams: dict[str, Any]) -> None:
    """Restore the random streams of a loaded `_rng_entry`."""
    torch.set_rng_state(streams["torch"])
    platform.set_rng_state(streams["cuda"])
    get_cuda_rng_tracker().set_states(streams["megatron"])
    random.setstate(streams["python"])


def _sharded_weights(chunk: MegatronModule, prefix: str) -> dict[str, Any]:
    if has_adapters([chunk]):
        return adapter_checkpoint.sharded_adapters(chunk, prefix)
    # Over data and context parallelism the weights are equal; Megatron marks the copies by it.
    metadata = {"dp_cp_group": process_groups([chunk]).dp_cp}
    return without_extra_state(chunk.sharded_state_dict(prefix=prefix, metadata=metadata))


def _optimizer_parts(optimizer: Any) -> list[Any]:
    """Return the optimizers that have parameters: that of dense ones has none where only experts
    have adapters."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in parts if getattr(part, "buffers", None)]


@contextlib.contextmanager
def _little_to_collect() -> Iterator[None]:
    """Exclude all objects that exist now from garbage collection inside the block.

    Megatron collects after every part, 0.4 s a time for the objects of its imports alone."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _separate_steps(torch_optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter of torch's AdamW a step tensor of its own again.

    After loading they share one (distrib_optimizer.py:1032): the next update would increment it
    once per parameter, and Adam's bias correction would be over in one step. On a GPU the step is a
    number of the group."""
    for state in torch_optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone()


def _allocate_state(optimizer: Any) -> None:
    """Give optimizers that have not stepped yet their moments, by a step that changes nothing.

    Megatron's distributed optimizer over torch's AdamW can neither save nor load without them."""
    for part in _optimizer_parts(optimizer):
        torch_optimizer = part.optimizer
        if torch_optimizer.state:
            continue
        rates = [group["lr"] for group in torch_optimizer.param_groups]
        for group in torch_optimizer.param_groups:
            group["lr"] = 0.0
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        torch_optimizer.step()
        torch_optimizer.zero_grad()
        for group, rate in zip(torch_optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
            if "step" in group:
                group["step"] = 0
        for state in torch_optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"].zero_()


UNREADABLE = (
    KeyError,
    RuntimeError,
    ValueError,
    OSError,
    EOFError,
    UnpicklingError,
    CheckpointingException,
    CheckpointException,
)
"""Errors of Megatron and torch for unexpected names, shapes or bytes."""


def find_faults_on_all_ranks(folder: Path, verify: Verify) -> list[str]:
    """Return the faults of `folder`, one line per file, the same on every rank.

    Called on all ranks together; each reads its share of the bytes."""
    faults: list[str] = []
    if verify != "none":
        try:
            entries = manifest.read_manifest(folder)
            share = manifest.files_to_verify(entries, dist.get_rank(), dist.get_world_size())
            faults = manifest.manifest_faults(folder, verify, share)
        except ManifestError as error:
            faults = [str(error)]
    from_all_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(from_all_ranks, faults)  # over all ranks: all refuse, or none
    return sorted({fault for faults in from_all_ranks for fault in faults})


def load_networks(folder: Path, networks: Networks) -> bool:
    """Read `folder` into `networks` and, at the layout that wrote it, every rank's random streams.

    Returns whether the streams were restored.

    Raises:
        UserError: the folder's tensors do not fit the model; it names the folder.
    """
    tree = sharded_tree(networks)
    own_layout = parallel_layout(networks.policy.chunks)
    try:
        common_state = dist_checkpointing.load_common_state_dict(str(folder))
        check_base(folder, common_state.get(BASE_FINGERPRINT_KEY), networks.policy.chunks)
        written_by = common_state.get("layout")
        if written_by == own_layout:
            tree["rng"] = _rng_entry(loading=True)
        # A rank asks for its own part of the optimizer (`_own_part`), so that the ranks with the
        # first copy of a parameter do not ask for all of it: that every part of every tensor is
        # there was checked when it was written.
        loaded_state = dist_checkpointing.load(tree, str(folder), validate_access_integrity=False)
    except UserError:
        raise
    except UNREADABLE as error:
        _check_reference(folder, networks)
        # The first lines are a traceback; an EOFError has no text.
        cause = (str(error).strip().splitlines() or [repr(error)])[-1].strip()
        raise UserError(
            f"checkpoint {folder} does not fit this model and recipe ({cause[:300]}); "
            "continue with the recipe that wrote it, or start in another run.folder",
            key="checkpoint",
            cause=Cause.CHANGED,
        ) from error
    _restore_networks(loaded_state, networks)
    if written_by == own_layout:
        _restore_rng(loaded_state["rng"])
    return written_by == own_layout


def _check_reference(folder: Path, networks: Networks) -> None:
    """Raise UserError where a reference is wanted that the checkpoint does not have."""
    names: Iterable[str] = (REFERENCE_PREFIX,)
    with contextlib.suppress(*UNREADABLE):
        names = dist_checkpointing.load_tensors_metadata(str(folder))
    if networks.reference is not None and not any(
        name.startswith(REFERENCE_PREFIX) for name in names
    ):
        raise UserError(
            f"checkpoint {folder} has no reference policy: rl.kl_beta was 0 when the run began, "
            "and rl.schedule cannot add a KL penalty; leave it out, or start a new run with "
            "rl.kl_beta from the exported model",
            key="rl.kl_beta",
            cause=Cause.CHANGED,
        )
