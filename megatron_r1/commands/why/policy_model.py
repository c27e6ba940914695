"""The policy in transformers: log-probabilities of logged tokens under the weights of a checkpoint.

Nothing of it runs in the trainer but the reading of tensors by the table of weights: the model is
transformers' class in fp32. Everything is on the CPU, a few responses at a time, padded on the
right, which a causal model does not see."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from megatron_r1.commands.why.comparison import CannotRecompute
from megatron_r1.models.hf_config import read_hf_config
from megatron_r1.models.transformers_model import load_with_transformers
from megatron_r1.models.weights.formats.dcp import Box, DistributedCheckpoint
from megatron_r1.models.weights.formats.hf_folder import HFWeights
from megatron_r1.models.weights.formats.hf_writer import copy_model_files
from megatron_r1.models.weights.formats.megatron_weights import MegatronWeights
from megatron_r1.models.weights.formats.published_layout import stacked_part

TOKENS_AT_ONCE, LOGITS_AT_ONCE = 4096, 2**26
"""Tokens and logits of a forward pass, padding included, unless one response has more."""
BYTES_PER_LOGIT = 28
"""fp32 logits, and in float64 their log-softmax, its exponentials and a gradient."""
TINY = 1e-3
"""Of the root mean square of a tensor's gradients: what rounding of sums in float32 reaches."""
MOMENTS = ("exp_avg", "exp_avg_sq")
STATE, REFERENCE = "optimizer.state.", "reference."
ROUTER_BIAS = "e_score_correction_bias"


def opened(checkpoint: Path) -> DistributedCheckpoint:
    """Return a checkpoint, one object for all who read it: where a tensor's bytes begin is looked
    up once."""
    return _opened(checkpoint, (checkpoint / ".metadata").stat().st_mtime_ns)


@lru_cache(maxsize=8)
def _opened(checkpoint: Path, _written: int) -> DistributedCheckpoint:
    return DistributedCheckpoint(checkpoint)


class _Part:
    """The tensors of a checkpoint whose keys have a prefix, under the keys of the weights; the
    weights' own where the part has none, as moments have none of a router's bias."""

    def __init__(self, checkpoint: DistributedCheckpoint, prefix: str) -> None:
        self._checkpoint, self._prefix = checkpoint, prefix

    def __getattr__(self, name: str) -> Any:
        return getattr(self._checkpoint, name)

    def read(self, key: str, starts: Box, sizes: Box) -> Tensor:
        full_name = self._prefix + key
        return self._checkpoint.read(
            full_name if full_name in self._checkpoint.shapes else key, starts, sizes
        )


def has_part(checkpoint: Path, prefix: str) -> bool:
    """Return whether any key of a checkpoint has a prefix."""
    return any(key.startswith(prefix) for key in opened(checkpoint).shapes)


def read_model(source: Path, hf_files: Path, prefix: str = "") -> torch.nn.Module:
    """Return transformers' model, fp32, with the tensors of a checkpoint or of a model's folder.

    Args:
        source: a checkpoint of the run, or a Hugging Face folder.
        hf_files: the folder of the model's config.json.
        prefix: what a checkpoint's keys of the tensors begin with: "" for the weights,
            "reference.", "optimizer.state.exp_avg.", …

    Raises:
        UserError: the source is incomplete, or another model's."""
    transformers.logging.set_verbosity_error()  # of what a checkpoint has besides: MTP layers
    transformers.logging.disable_progress_bar()
    hf = read_hf_config(str(hf_files))
    if (source / "config.json").is_file():
        return _trainable(load_with_transformers(source, hf, torch.float32))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with MegatronWeights(source, hf) as weights:
            weights.checkpoint.close()
            weights.checkpoint = cast(Any, _Part(opened(source), prefix))
            tensors = dict(_tensors(weights, hf))
        if (loaded := _from_template(hf_files, tensors)) is not None:
            return loaded
        copy_model_files(hf_files, folder)
        config = json.loads((hf_files / "config.json").read_text(encoding="utf-8"))
        config.pop("quantization_config", None)
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        loaded = _trainable(load_with_transformers(folder, hf, torch.float32))
    state = loaded.state_dict()
    stacked = _stacked_experts(tensors)
    if "lm_head.weight" not in stacked:  # tied
        stacked["lm_head.weight"] = stacked.get("model.embed_tokens.weight", torch.empty(0))
    # A checkpoint may have more, as MTP layers.
    if all(
        name in stacked and torch.equal(tensor, stacked[name]) for name, tensor in state.items()
    ):
        _templates.clear()
        _templates[hf_files] = loaded
    return loaded


_templates: dict[Path, torch.nn.Module] = {}
"""The newest model whose tensors are a checkpoint's, by name and value: transformers converts none
of them, so that others of its shape need not go through files."""


def _from_template(hf_files: Path, tensors: Mapping[str, Tensor]) -> torch.nn.Module | None:
    """Return a model with these tensors; None where transformers has to convert them."""
    if hf_files not in _templates:
        return None
    copied = copy.deepcopy(_templates[hf_files])
    copied.load_state_dict(_stacked_experts(tensors), strict=False)
    return copied


OF_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


def _stacked_experts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with those of experts as transformers' classes have them: one tensor of
    all experts, gate and up together."""
    stacked: dict[str, Tensor] = {}
    parts: dict[str, dict[tuple[str, int], Tensor]] = {}
    for name, tensor in tensors.items():
        if (match := OF_EXPERT.fullmatch(name)) is None:
            stacked[name] = tensor
        else:
            parts.setdefault(match[1], {})[match[3], int(match[2])] = tensor
    for name, experts in parts.items():
        numbers = sorted({number for _, number in experts})
        if {("gate", 0), ("up", 0), ("down", 0)} <= experts.keys():
            pairs = [torch.cat([experts["gate", n], experts["up", n]]) for n in numbers]
            stacked[f"{name}.gate_up_proj"] = torch.stack(pairs)
            stacked[f"{name}.down_proj"] = torch.stack([experts["down", n] for n in numbers])
    return stacked


def _trainable(model: torch.nn.Module) -> torch.nn.Module:
    """Let the padding token's embedding have a gradient too, as it has in the trainer."""
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None
    return model.eval()


def _tensors(weights: MegatronWeights | HFWeights, hf: dict) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor of the weights, fp32, under its published name."""
    stacked: dict[str, Tensor] = {}
    for name, (shape, _) in weights.tensors.items():
        values = weights.read(name, 0, 0, shape[0]).float().contiguous()
        part = stacked_part(hf, name)
        if part is None:
            yield name, values
            continue
        stacked_tensor = stacked.setdefault(
            part.name, torch.empty(part.stored_shape(shape, hf["n_routed_experts"]))
        )
        part.select(stacked_tensor[part.expert]).copy_(values)
    yield from stacked.items()


def read_state(checkpoint: Path) -> int | None:
    """Return the finished updates that Adam's bias correction counts, of a checkpoint; None where
    it says nothing."""
    common = torch.load(checkpoint / "common.pt", weights_only=True, map_location="cpu")
    step = common.get("optimizer_step")
    return None if step is None else int(step)


@dataclass(frozen=True)
class TokenRow:
    """One sequence of tokens of a response: all of it, or a branch of an episode.

    Attributes:
        token_ids: int64, (tokens,).
        is_sampled: bool, (tokens,): those that the policy sampled.
        logprobs: float32, (sampled tokens,): the engine's.
        response: the number of the response in the step.
        advantage: each token's; NaN: it is not trained on.
        num_sampled: the sampled tokens of the response with all its branches.
        token_advantages: each sampled token's, float64, where they differ; None: `advantage`.
        targets: int64, (tokens,): the token whose log-probability is computed at each; None:
            `token_ids`.
        kept: (sampled tokens,) numbers of ids that the engine drew each token from, and these ids,
            one token's after the other's, int64; None: it drew from the whole vocabulary."""

    token_ids: Tensor
    is_sampled: Tensor
    logprobs: Tensor
    response: int
    advantage: float
    num_sampled: int
    kept: tuple[Tensor, Tensor] | None = None
    token_advantages: Tensor | None = None
    targets: Tensor | None = None

    @property
    def is_trained(self) -> bool:
        """Whether the row has an advantage."""
        return not math.isnan(self.advantage)


def batches(rows: Sequence[TokenRow], vocabulary: int) -> Iterator[list[int]]:
    """Yield indices of rows of similar length, as many as fit into a pass."""
    most = min(TOKENS_AT_ONCE, LOGITS_AT_ONCE // vocabulary)
    batch: list[int] = []
    for index in sorted(
        range(len(rows)), key=lambda index_of_row: -len(rows[index_of_row].token_ids)
    ):
        longest = len(rows[(batch or [index])[0]].token_ids)
        if batch and longest * (len(batch) + 1) > most:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def token_logits(model: Any, rows: Sequence[TokenRow]) -> list[Tensor]:
    """Return of each row the logits that predict its sampled tokens, (sampled tokens, vocabulary)
    float32."""
    longest = max(len(row.token_ids) for row in rows)
    ids = torch.zeros((len(rows), longest), dtype=torch.int64)
    for at, row in enumerate(rows):
        ids[at, : len(row.token_ids)] = row.token_ids
    out = model(input_ids=ids, use_cache=False).logits
    return [out[at, : len(row.token_ids) - 1][row.is_sampled[1:]] for at, row in enumerate(rows)]


def token_logprobs_and_entropies(
    logits: Tensor, row: TokenRow, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return log-probability and entropy of each sampled token, float64: over the ids that the
    engine kept, where it kept a part.

    Args:
        logits: (sampled tokens, vocabulary).
        row: the sequence.
        temperature: the logits are divided by it.

    Raises:
        CannotRecompute: a sampled token is not among the ids that were kept for it."""
    logits = logits.double() / temperature
    ids = (row.token_ids if row.targets is None else row.targets)[row.is_sampled][:, None]
    if row.kept is None:
        logprobs = torch.log_softmax(logits, dim=-1)
    else:
        counts, kept_ids = row.kept
        is_cut = torch.ones(logits.shape, dtype=torch.bool)
        is_cut[torch.arange(len(counts)).repeat_interleave(counts), kept_ids] = False
        logprobs = torch.log_softmax(logits.masked_fill(is_cut, -math.inf), dim=-1)
        if bool(is_cut.gather(1, ids).any()):
            raise CannotRecompute("a sampled token is not among those that its engine kept")
        logprobs = logprobs.masked_fill(is_cut, 0)  # entropy counts 0 log 0 as 0
    return logprobs.gather(1, ids)[:, 0], -(logprobs.exp() * logprobs).sum(-1)


@torch.no_grad()
def logprobs(
    model: Any, rows: Sequence[TokenRow], temperatures: Sequence[float] = (1.0,)
) -> list[list[Tensor]]:
    """Return the log-probability of every sampled token, float64, by temperature and row.

    Args:
        model: as `read_model` returns it.
        rows: the sequences.
        temperatures: the logits are divided by each."""
    logprobs_of_rows: list[list[Tensor]] = [[torch.empty(0)] * len(rows) for _ in temperatures]
    for batch in batches(rows, model.config.vocab_size):
        for index, logits in zip(
            batch, token_logits(model, [rows[at] for at in batch]), strict=True
        ):
            for by_temperature, temperature in zip(logprobs_of_rows, temperatures, strict=True):
                by_temperature[index] = token_logprobs_and_entropies(
                    logits, rows[index], temperature
                )[0]
    return logprobs_of_rows


@contextlib.contextmanager
def seen_experts(model: Any) -> Iterator[dict[str, Tensor]]:
    """Note in the block which experts each forward pass chooses.

    Yields the newest pass's by the name of the layer's experts, (tokens of the batch, experts per
    token) int64; padding is among the tokens."""
    seen: dict[str, Tensor] = {}
    handles = []
    for name, module in model.named_modules():
        if name.endswith(".experts"):

            def note(module: Any, inputs: tuple, options: dict, name: str = name) -> None:
                for value in (*inputs, *options.values()):
                    if isinstance(value, Tensor) and value.dtype == torch.int64:
                        seen[name] = value.detach()

            handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def chosen_experts(model: Any, rows: Sequence[TokenRow]) -> dict[str, list[Tensor]]:
    """Return, by the name of each layer of routed experts, the experts that each row's sampled
    tokens were predicted by, (sampled tokens, experts per token) int64; empty for dense models."""
    chosen: dict[str, list[Tensor]] = {}
    with seen_experts(model) as seen:
        for batch in batches(rows, model.config.vocab_size):
            seen.clear()
            members = [rows[at] for at in batch]
            token_logits(model, members)
            longest = max(len(row.token_ids) for row in members)
            for name, experts in seen.items():
                by_row = experts.reshape(len(batch), longest, -1)
                of_layer = chosen.setdefault(name, [torch.empty(0)] * len(rows))
                for at, index in enumerate(batch):
                    row = rows[index]
                    of_layer[index] = by_row[at, : len(row.token_ids) - 1][row.is_sampled[1:]]
    return chosen


class RouterBiases:
    """The correction biases of a model's routers, which a rule of their own balances (arXiv
    2408.15664): after an update each moves by a rate, up where an expert had fewer of the
    update's tokens than the mean, prompts included.

    Args:
        model: the model, whose biases are changed.
        rate: `model.expert_bias_update_rate`."""

    def __init__(self, model: Any, rate: float) -> None:
        self._model, self._rate = model, rate
        self._counts: dict[str, Tensor] = {}

    def count(self, seen: Mapping[str, Tensor], rows: Sequence[TokenRow]) -> None:
        """Count the tokens of a forward pass.

        Args:
            seen: what `seen_experts` noted of it.
            rows: the sequences of the pass, in order."""
        longest = max(len(row.token_ids) for row in rows)
        for name, experts in seen.items():
            by_row = experts.reshape(len(rows), longest, -1)
            chosen = torch.cat(
                [
                    row_experts[: len(row.token_ids)].flatten()
                    for row_experts, row in zip(by_row, rows, strict=True)
                ]
            )
            size = len(self._bias(name))
            counts = torch.bincount(chosen, minlength=size)
            self._counts[name] = self._counts.get(name, torch.zeros_like(counts)) + counts

    @torch.no_grad()
    def update(self) -> None:
        """Move the biases, and begin to count anew."""
        for name, counts in self._counts.items():
            self._bias(name).add_(self._rate * (counts.double().mean() - counts).sign())
        self._counts.clear()

    def _bias(self, experts: str) -> Tensor:
        router = self._model.get_submodule(experts.removesuffix(".experts") + ".gate")
        return getattr(router, ROUTER_BIAS)


@torch.no_grad()
def distances(
    a: Any, b: Any, base: Any, second: Mapping[str, Tensor]
) -> dict[str, tuple[float, float]]:
    """Return of every parameter and buffer the norm of a - b, and that of b - base, float64.

    Adam divides by the root of the second moment: of numbers whose gradient is rounding alone
    (`TINY` of the tensor's) the change is that rounding, grown to a step. They are left out.

    Args:
        a: a model.
        b: another with the same parameters.
        base: the model that both come from.
        second: the second moments of parameters, by name."""
    other_state, bases = b.state_dict(), base.state_dict()
    by_name = {}
    for name, tensor in a.state_dict().items():
        if not tensor.is_floating_point() or name not in other_state:
            continue
        apart = tensor.double() - other_state[name].double()
        moved = other_state[name].double() - bases[name].double()
        if (moment := second.get(name)) is not None:
            is_known = (moment == 0) | (moment >= TINY**2 * moment.mean())
            apart, moved = apart * is_known, moved * is_known
        by_name[name] = float(apart.norm()), float(moved.norm())
    return by_name


@torch.no_grad()
def relative_distance(a: Any, b: Any) -> float:
    """Return |a - b| / |b| over all parameters and buffers of two models."""
    other_state = b.state_dict()
    apart = size = 0.0
    for name, tensor in a.state_dict().items():
        if not tensor.is_floating_point():
            continue
        other_values = other_state[name].double()
        apart += float((tensor.double() - other_values).square().sum())
        size += float(other_values.square().sum())
    return math.sqrt(apart / size) if size else math.sqrt(apart)
