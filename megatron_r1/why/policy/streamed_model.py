"""Runs a transformers model with one decoder layer in memory at a time.

`sampled_logprobs` and `chosen_experts` return what `token_logprobs` and `routed_experts` return of
a whole model.

A pass goes through all rows layer by layer: the model's own forward is run once for each batch with
layers that do nothing, which gives what each layer is called with (embeddings, masks, positions);
then each layer is read and run on every batch; then final norm and head follow, a few tokens at a
time. So the checkpoint is read once for a pass, again only where the hidden states of all rows do
not fit into the memory that `stream_memory` divides."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.func import functional_call

from megatron_r1.why.comparison import CannotRecompute
from megatron_r1.why.policy.expert_replay import row_replay
from megatron_r1.why.policy.routed_experts import add_chosen, seen_experts
from megatron_r1.why.policy.tensor_source import TensorSource
from megatron_r1.why.policy.token_logprobs import (
    BYTES_PER_LOGIT,
    LOGITS_AT_ONCE,
    TOKENS_AT_ONCE,
    forward_inputs,
    length_batches,
    token_logprobs_and_entropies,
)
from megatron_r1.why.policy.token_rows import TokenRow

Note = Callable[[list[int], Mapping[str, Tensor]], None]
LAYER_BYTES, OUTER_BYTES = 6, 8
"""Bytes a parameter while it is read, of a layer and of embedding and head: fp32, and the newest
tensor as it is stored, of a layer a part of it."""
NUM_ACTIVATIONS = 12
"""Activations of a layer that are in memory at once, fp32, each as wide as its widest."""


@dataclass
class _Batch:
    """A batch of rows on its way through the layers.

    Attributes:
        indices: the numbers of its rows.
        rows: its rows.
        hidden: (rows, tokens, hidden size), the input of the next layer.
        calls: the other arguments of each layer."""

    indices: list[int]
    rows: list[TokenRow]
    hidden: Tensor = field(default_factory=lambda: torch.empty(0))
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)

    def record(self, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Keep what a layer is called with."""
        self.hidden = args[0]
        self.calls.append((args[1:], options))

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors that are kept."""
        tensors = {id(tensor): tensor for tensor in _tensors_in([self.hidden, self.calls])}
        return sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())


class StreamedModel:
    """A model whose layers are read just before they are run.

    Args:
        skeleton: transformers' model without weights, as `build_without_weights` returns it.
        source: its weights.
        memory: what a pass may take."""

    def __init__(self, skeleton: Any, source: TensorSource, memory: StreamMemory) -> None:
        self.skeleton, self.source, self.memory = skeleton, source, memory

    @property
    def config(self) -> Any:
        """Transformers' configuration."""
        return self.skeleton.config

    def with_source(self, source: TensorSource) -> StreamedModel:
        """Return the model with other weights."""
        return StreamedModel(self.skeleton, source, self.memory)

    @torch.no_grad()
    def hidden_states(
        self, rows: Sequence[TokenRow], note: Note | None = None
    ) -> Iterator[dict[int, Tensor]]:
        """Yield the outputs of the last layer that predict the sampled tokens, for as many rows as
        are kept at once: {row's index: (sampled tokens, hidden size)}.

        Args:
            rows: the sequences.
            note: called after each layer and batch with the indices of the batch's rows and the
                experts that were chosen, by the name of the layer's experts."""
        remaining_batches = list(length_batches(rows, self.config.vocab_size))
        while remaining_batches:
            num_batches, outputs = self._run_first_batches(remaining_batches, rows, note)
            del remaining_batches[:num_batches]
            yield outputs

    def _run_first_batches(
        self, remaining_batches: Sequence[list[int]], rows: Sequence[TokenRow], note: Note | None
    ) -> tuple[int, dict[int, Tensor]]:
        """Run all layers on the first batches, and return how many and the outputs by row."""
        pass_batches = self._embed_batches(remaining_batches, rows)
        for index in range(len(self._decoder_layers)):
            self._run_layer(index, pass_batches, note)
        return len(pass_batches), {
            row_index: hidden[: len(row.token_ids) - 1][row.is_sampled[1:]]
            for batch in pass_batches
            for row_index, row, hidden in zip(batch.indices, batch.rows, batch.hidden, strict=True)
        }

    def head(self) -> Callable[[Tensor], Tensor]:
        """Return the function of final norm and head, which keeps their weights: outputs of the
        last layer, (tokens, hidden size) → logits, (tokens, vocabulary)."""
        names = [name for name in self._outer_names if not name.endswith("embed_tokens.weight")]
        state = self._read_weights(self.skeleton, "", names)

        @torch.no_grad()
        def logits(hidden: Tensor) -> Tensor:
            with self._idle_layers(lambda args, options: None):
                options = {"inputs_embeds": hidden[None], "use_cache": False}
                return cast(Tensor, functional_call(self.skeleton, state, (), options).logits[0])

        return logits

    @property
    def _decoder_layers(self) -> Sequence[torch.nn.Module]:
        return cast(Any, self.skeleton.base_model.layers)[: self.config.num_hidden_layers]

    @property
    def _outer_names(self) -> list[str]:
        """The weights outside of the layers."""
        return [name for name in self.skeleton.state_dict() if ".layers." not in name]

    def _embed_batches(
        self, remaining_batches: Sequence[list[int]], rows: Sequence[TokenRow]
    ) -> list[_Batch]:
        """Return the first batches with what the model's forward calls its layers with."""
        base, prefix = self.skeleton.base_model, f"{self.skeleton.base_model_prefix}."
        names = [name for name in self._outer_names if name.startswith(prefix)]
        state = self._read_weights(base, prefix, [name.removeprefix(prefix) for name in names])
        pass_batches: list[_Batch] = []
        free_bytes = self.memory.kept_bytes
        for indices in remaining_batches:
            batch = _Batch(indices, [rows[index] for index in indices])
            with self._idle_layers(batch.record):
                functional_call(base, state, (), {**forward_inputs(batch.rows), "use_cache": False})
            free_bytes -= batch.num_bytes
            if pass_batches and free_bytes < 0:
                break
            pass_batches.append(batch)
        return pass_batches

    def _run_layer(self, index: int, pass_batches: Sequence[_Batch], note: Note | None) -> None:
        """Read a layer, run it on batches, and free it."""
        layer = cast(Any, self._decoder_layers[index])
        prefix = f"{self.skeleton.base_model_prefix}.layers.{index}."
        state = self._read_weights(layer, prefix, list(layer.state_dict()))
        with seen_experts(self.skeleton) as experts:
            for batch in pass_batches:
                args, options = batch.calls[index]
                with row_replay(self.skeleton, batch.rows):
                    out = functional_call(layer, state, (batch.hidden, *args), options)
                batch.hidden = out if isinstance(out, Tensor) else out[0]
                if note is not None:
                    note(batch.indices, experts)
                experts.clear()

    def _read_weights(self, module: Any, prefix: str, names: Sequence[str]) -> dict[str, Tensor]:
        """Return weights of a module: experts that are read one by one as `ExpertStack`."""
        shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
        return {
            name: ExpertStack.of(self.source, prefix + name, shapes[name])
            if self.memory.reads_experts and ".experts." in name
            else self.source.parameter(prefix + name, shapes[name])
            for name in names
        }

    @contextlib.contextmanager
    def _idle_layers(
        self, record: Callable[[tuple[Any, ...], dict[str, Any]], None]
    ) -> Iterator[None]:
        """Let the layers return their input in the block.

        Args:
            record: called with each layer's arguments, in the order of the layers."""

        def return_input(*args: Any, **options: Any) -> Any:
            record(args, options)
            return args[0]

        try:
            for layer in self._decoder_layers:
                layer.forward = return_input
            yield
        finally:
            for layer in self._decoder_layers:
                vars(layer).pop("forward", None)


class ExpertStack(Tensor):
    """The experts' weights of a layer: `stack[expert]` reads one expert's."""

    _row: Callable[[int], Tensor]

    @staticmethod
    def of(source: TensorSource, name: str, shape: tuple[int, ...]) -> ExpertStack:
        """Return the weights of a parameter of transformers' classes, without reading them.

        Args:
            source: the weights.
            name: the parameter's name in the whole model.
            shape: its shape, experts first."""
        stack = torch.empty(shape, device="meta").as_subclass(ExpertStack)
        stack._row = lambda expert: source.parameter(name, shape, expert)
        return stack

    def __getitem__(self, expert: Any) -> Tensor:
        return self._row(int(expert))


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors_in(item)


@torch.no_grad()
def sampled_logprobs(
    model: StreamedModel, rows: Sequence[TokenRow], temperatures: Sequence[float]
) -> list[list[Tensor]]:
    """Return the log-probability of every sampled token, float64, by temperature and row.

    Args:
        model: the model, read layer by layer.
        rows: the sequences.
        temperatures: the logits are divided by each."""
    by_temperature: list[list[Tensor]] = [[torch.empty(0)] * len(rows) for _ in temperatures]
    for outputs in model.hidden_states(rows):
        head = model.head()
        for index, hidden in outputs.items():
            row_by_temperature = _row_logprobs(
                head, hidden, rows[index], temperatures, model.memory
            )
            for logprobs_by_row, row_logprobs in zip(
                by_temperature, row_by_temperature, strict=True
            ):
                logprobs_by_row[index] = row_logprobs
        del head  # its weights, before the next layer is read
    return by_temperature


def _row_logprobs(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    row: TokenRow,
    temperatures: Sequence[float],
    memory: StreamMemory,
) -> list[Tensor]:
    """Return a row's log-probabilities by temperature, float64, from the last layer's outputs,
    (sampled tokens, hidden size)."""
    pieces = [[torch.empty(0, dtype=torch.float64)] for _ in temperatures]
    for tokens, part in _split_row(row, memory.logit_tokens):
        logits = head(hidden[tokens])
        for temperature_pieces, temperature in zip(pieces, temperatures, strict=True):
            temperature_pieces.append(token_logprobs_and_entropies(logits, part, temperature)[0])
    return [torch.cat(temperature_pieces) for temperature_pieces in pieces]


@torch.no_grad()
def chosen_experts(model: StreamedModel, rows: Sequence[TokenRow]) -> dict[str, list[Tensor]]:
    """Return what `routed_experts.chosen_experts` returns.

    Args:
        model: the model, read layer by layer.
        rows: the sequences."""
    experts_by_layer: dict[str, list[Tensor]] = {}

    def note(indices: list[int], experts: Mapping[str, Tensor]) -> None:
        add_chosen(experts_by_layer, experts, rows, indices)

    for _ in model.hidden_states(rows, note):
        pass
    return experts_by_layer


def _split_row(row: TokenRow, num_tokens: int) -> Iterator[tuple[slice, TokenRow]]:
    """Yield ranges of a row's sampled tokens, each with a copy of the row that samples these alone.

    Args:
        row: the sequence.
        num_tokens: the most tokens of a range."""
    places = row.is_sampled.nonzero()[:, 0]
    for start in range(0, len(places), num_tokens):
        tokens = slice(start, start + num_tokens)
        is_sampled = torch.zeros_like(row.is_sampled)
        is_sampled[places[tokens]] = True
        part = replace(row, is_sampled=is_sampled)
        if row.kept_ids is not None:
            counts, ids = row.kept_ids
            first, end = int(counts[:start].sum()), int(counts[: start + num_tokens].sum())
            part = replace(part, kept_ids=(counts[tokens], ids[first:end]))
        yield tokens, part


class StreamMemory(NamedTuple):
    """How a model whose layers are read one by one spends memory.

    Attributes:
        kept_bytes: the most of hidden states and masks for which the layers are read once.
        logit_tokens: tokens whose logits are there at once.
        reads_experts: whether experts are read one by one too, each batch anew."""

    kept_bytes: int
    logit_tokens: int
    reads_experts: bool


def stream_memory(skeleton: Any, free_bytes: int, longest: int) -> StreamMemory:
    """Return how a model is streamed.

    Args:
        skeleton: transformers' model without weights.
        free_bytes: the memory that it may take.
        longest: tokens of the longest sequence.

    Raises:
        CannotRecompute: not even one layer fits, or its experts one by one."""
    config = skeleton.config
    largest_layer, layer_with_one_expert = _layer_sizes(skeleton)
    outer_values = config.vocab_size * config.hidden_size
    tokens = max(longest, min(TOKENS_AT_ONCE, LOGITS_AT_ONCE // config.vocab_size))
    widths = [getattr(config, name, None) or 0 for name in ("intermediate_size", "hidden_size")]
    activations = 4 * NUM_ACTIVATIONS * max(widths) * tokens
    min_bytes = 4 * config.hidden_size * tokens + BYTES_PER_LOGIT * config.vocab_size
    for layer, reads_experts in ((largest_layer, False), (layer_with_one_expert, True)):
        num_bytes = max(LAYER_BYTES * layer, OUTER_BYTES * outer_values) + activations
        if num_bytes + 2 * min_bytes <= free_bytes:
            half = (free_bytes - num_bytes) // 2
            return StreamMemory(half, half // (BYTES_PER_LOGIT * config.vocab_size), reads_experts)
    raise CannotRecompute(
        "the largest layer without its experts, or embedding or head, and the activations of "
        f"{tokens:,} tokens need {(num_bytes + 2 * min_bytes) / 1e9:,.1f} GB, "
        f"{free_bytes / 1e9:,.1f} GB are free"
    )


def _layer_sizes(skeleton: Any) -> tuple[int, int]:
    """Return the parameters of the largest layer, and of the largest with one of its experts."""
    sizes, single = [0], [0]
    for layer in skeleton.base_model.layers:
        tensors = dict(layer.named_parameters())
        experts = {name: tensors[name] for name in tensors if ".experts." in name}
        sizes.append(sum(tensor.numel() for tensor in tensors.values()))
        num_expert_values = sum(tensor.numel() for tensor in experts.values())
        num_single_values = sum(tensor.numel() // len(tensor) for tensor in experts.values())
        single.append(sizes[-1] - num_expert_values + num_single_values)
    return max(sizes), max(single)
