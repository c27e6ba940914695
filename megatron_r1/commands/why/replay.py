"""A step in transformers: log-probabilities of logged tokens under the weights of a checkpoint, and
the step's updates once more, by autograd over fp64 formulas and an AdamW of its own.

Nothing of it runs in the trainer but the reading of tensors by the table of weights: the model is
transformers' class in fp32, the loss is written out here from the papers, and the optimizer is its
formula (Loshchilov and Hutter, arXiv 1711.05101, with Adam's bias correction). Everything is on the
CPU, a few responses at a time, padded on the right, which a causal model does not see."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from megatron_r1.commands.why.finding import CannotRecompute
from megatron_r1.models.by_transformers import load_by_transformers
from megatron_r1.models.hf_config import read_hf_config
from megatron_r1.models.weights.stored.dcp import Box, DistributedCheckpoint
from megatron_r1.models.weights.stored.hf_folder import HFWeights
from megatron_r1.models.weights.stored.hf_writing import copy_model_files
from megatron_r1.models.weights.stored.megatron_weights import MegatronWeights
from megatron_r1.models.weights.stored.published import stacked_part

TOKENS_AT_ONCE, LOGITS_AT_ONCE = 4096, 2**26
"""Tokens and logits of a forward pass, padding included, unless one response has more."""
BYTES_PER_LOGIT = 28
"""fp32 logits, and in float64 their log-softmax, its exponentials and a gradient."""
MOMENTS = ("exp_avg", "exp_avg_sq")
STATE, REFERENCE = "optimizer.state.", "reference."
ROUTER_BIAS = "e_score_correction_bias"


class _Part(DistributedCheckpoint):
    """The tensors of a checkpoint whose keys have a prefix, under the keys of the weights; the
    weights' own where the part has none, as moments have none of a router's bias."""

    def __init__(self, folder: Path, prefix: str) -> None:
        super().__init__(folder)
        self._prefix = prefix

    def read(self, key: str, starts: Box, sizes: Box) -> Tensor:
        own = self._prefix + key
        return super().read(own if own in self.shapes else key, starts, sizes)


def has_part(checkpoint: Path, prefix: str) -> bool:
    """Return whether any key of a checkpoint has a prefix."""
    return any(key.startswith(prefix) for key in DistributedCheckpoint(checkpoint).shapes)


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
        return _trainable(load_by_transformers(source, hf, torch.float32))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with MegatronWeights(source, hf) as weights:
            if prefix:
                weights.checkpoint.close()
                weights.checkpoint = _Part(source, prefix)
            tensors = dict(_tensors(weights, hf))
        copy_model_files(hf_files, folder)
        config = json.loads((hf_files / "config.json").read_text(encoding="utf-8"))
        config.pop("quantization_config", None)
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return _trainable(load_by_transformers(folder, hf, torch.float32))


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
        whole = stacked.setdefault(
            part.name, torch.empty(part.stored_shape(shape, hf["n_routed_experts"]))
        )
        part.select(whole[part.expert]).copy_(values)
    yield from stacked.items()


def read_state(checkpoint: Path) -> int | None:
    """Return the finished updates that Adam's bias correction counts, of a checkpoint; None where
    it says nothing."""
    common = torch.load(checkpoint / "common.pt", weights_only=True, map_location="cpu")
    step = common.get("optimizer_step")
    return None if step is None else int(step)


@dataclass(frozen=True)
class Row:
    """One sequence of tokens of a response: all of it, or a branch of an episode.

    Attributes:
        token_ids: int64, (tokens,).
        is_sampled: bool, (tokens,): those that the policy sampled.
        logprobs: float32, (sampled tokens,): the engine's.
        response: the number of the response in the step.
        advantage: each token's; NaN: it is not trained on.
        num_sampled: the sampled tokens of the response with all its branches.
        kept: (sampled tokens,) numbers of ids that the engine drew each token from, and these ids,
            one token's after the other's, int64; None: it drew from the whole vocabulary."""

    token_ids: Tensor
    is_sampled: Tensor
    logprobs: Tensor
    response: int
    advantage: float
    num_sampled: int
    kept: tuple[Tensor, Tensor] | None = None

    @property
    def is_trained(self) -> bool:
        """Whether the row has an advantage."""
        return not math.isnan(self.advantage)


def _batches(rows: Sequence[Row], vocabulary: int) -> Iterator[list[int]]:
    """Yield indices of rows of similar length, as many as fit into a pass."""
    most = min(TOKENS_AT_ONCE, LOGITS_AT_ONCE // vocabulary)
    batch: list[int] = []
    for index in sorted(range(len(rows)), key=lambda each: -len(rows[each].token_ids)):
        longest = len(rows[(batch or [index])[0]].token_ids)
        if batch and longest * (len(batch) + 1) > most:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _logits(model: Any, rows: Sequence[Row]) -> list[Tensor]:
    """Return of each row the logits that predict its sampled tokens, (sampled tokens, vocabulary)
    float32."""
    longest = max(len(row.token_ids) for row in rows)
    ids = torch.zeros((len(rows), longest), dtype=torch.int64)
    for at, row in enumerate(rows):
        ids[at, : len(row.token_ids)] = row.token_ids
    out = model(input_ids=ids, use_cache=False).logits
    return [out[at, : len(row.token_ids) - 1][row.is_sampled[1:]] for at, row in enumerate(rows)]


def _of_tokens(logits: Tensor, row: Row, temperature: float) -> tuple[Tensor, Tensor]:
    """Return log-probability and entropy of each sampled token, float64: over the ids that the
    engine kept, where it kept a part.

    Raises:
        CannotRecompute: a sampled token is not among the ids that were kept for it."""
    logits = logits.double() / temperature
    if row.kept is None:
        logprobs = torch.log_softmax(logits, dim=-1)
    else:
        counts, ids = row.kept
        is_cut = torch.ones(logits.shape, dtype=torch.bool)
        is_cut[torch.arange(len(counts)).repeat_interleave(counts), ids] = False
        logprobs = torch.log_softmax(logits.masked_fill(is_cut, -math.inf), dim=-1)
        if bool(is_cut.gather(1, row.token_ids[row.is_sampled][:, None]).any()):
            raise CannotRecompute("a sampled token is not among those that its engine kept")
        logprobs = logprobs.masked_fill(is_cut, 0)  # entropy counts 0 log 0 as 0
    own = logprobs.gather(1, row.token_ids[row.is_sampled][:, None])[:, 0]
    return own, -(logprobs.exp() * logprobs).sum(-1)


@torch.no_grad()
def logprobs(
    model: Any, rows: Sequence[Row], temperatures: Sequence[float] = (1.0,)
) -> list[list[Tensor]]:
    """Return the log-probability of every sampled token, float64, by temperature and row.

    Args:
        model: as `read_model` returns it.
        rows: the sequences.
        temperatures: the logits are divided by each."""
    found: list[list[Tensor]] = [[torch.empty(0)] * len(rows) for _ in temperatures]
    for batch in _batches(rows, model.config.vocab_size):
        for index, logits in zip(batch, _logits(model, [rows[at] for at in batch]), strict=True):
            for by_temperature, temperature in zip(found, temperatures, strict=True):
                by_temperature[index] = _of_tokens(logits, rows[index], temperature)[0]
    return found


@torch.no_grad()
def chosen_experts(model: Any, rows: Sequence[Row]) -> dict[str, list[Tensor]]:
    """Return, by the name of each layer of routed experts, the experts that each row's sampled
    tokens were predicted by, (sampled tokens, experts per token) int64; empty for dense models."""
    chosen: dict[str, list[Tensor]] = {}
    seen: dict[str, Tensor] = {}
    handles = []
    for name, module in model.named_modules():
        if name.endswith(".experts"):

            def note(module: Any, given: tuple, options: dict, name: str = name) -> None:
                for value in (*given, *options.values()):
                    if isinstance(value, Tensor) and value.dtype == torch.int64:
                        seen[name] = value

            handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
    try:
        for batch in _batches(rows, model.config.vocab_size):
            seen.clear()
            members = [rows[at] for at in batch]
            _logits(model, members)
            longest = max(len(row.token_ids) for row in members)
            for name, experts in seen.items():
                by_row = experts.reshape(len(batch), longest, -1)
                of_layer = chosen.setdefault(name, [torch.empty(0)] * len(rows))
                for at, index in enumerate(batch):
                    row = rows[index]
                    of_layer[index] = by_row[at, : len(row.token_ids) - 1][row.is_sampled[1:]]
    finally:
        for handle in handles:
            handle.remove()
    return chosen


@dataclass(frozen=True)
class LossRules:
    """The step's loss as its settings say, or with one thing substituted.

    Attributes:
        average: "sequence", "token" or "constant".
        constant: L, tokens, of average "constant".
        clip_low: ε below 1.
        clip_high: ε above 1.
        dual_clip: the largest ratio of a negative advantage; None: no limit.
        is_sequence_ratio: one ratio per response.
        is_cispo: the clipped ratio is a weight of the log-probability.
        importance_cap: the largest weight by old policy over engine; None: no weights.
        kl_beta: the weight of KL; negative: with the wrong sign.
        kl_estimator: "k1", "k2" or "k3".
        entropy_coef: the weight of the entropy.
        temperature: the logits are divided by it.
        counts_prompts: divide by the tokens of prompt and response, as a denominator that counts
            masked tokens does."""

    average: str
    constant: int
    clip_low: float
    clip_high: float
    dual_clip: float | None
    is_sequence_ratio: bool
    is_cispo: bool
    importance_cap: float | None
    kl_beta: float
    kl_estimator: str
    entropy_coef: float
    temperature: float
    counts_prompts: bool = False


@dataclass(frozen=True)
class AdamRules:
    """AdamW's settings, and the learning rate of each update."""

    learning_rates: tuple[float, ...]
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    clip_grad: float


@dataclass
class Totals:
    """Sums over the rows of an update, float64.

    Attributes:
        policy: the policy's term of the loss.
        kl: the KL term, its weight included.
        entropy: the entropy's term, its weight included.
        denominator: what the three terms are divided by, as the loss is averaged.
        num_tokens: sampled tokens that are trained on.
        kl_sum: the KL estimates, nats, without their weight.
        entropy_sum: the entropies, nats, without their weight.
        clipped: tokens where the clip is active.
        importance: the importance weights.
        largest_ratio: the largest ratio of a token, a maximum and no sum.
    """

    policy: float = 0.0
    kl: float = 0.0
    entropy: float = 0.0
    denominator: float = 0.0
    num_tokens: int = 0
    kl_sum: float = 0.0
    entropy_sum: float = 0.0
    clipped: float = 0.0
    importance: float = 0.0
    largest_ratio: float = 0.0


@dataclass
class Update:
    """What an update measures, under the names of metrics.jsonl.

    Attributes:
        metrics: loss, kl, entropy, clip_fraction, ratio/max, grad_norm, …
        terms: the policy's, KL's and the entropy's part of the loss."""

    metrics: dict[str, float]
    terms: dict[str, float] = field(default_factory=dict)


class StepReplay:
    """The updates of a step, from the weights and moments of the checkpoint before it.

    Args:
        model: the policy, which is changed.
        moments: first and second moments, as models with the policy's parameters.
        num_updates: updates that Adam has counted.
        old: log-probabilities under the policy before the step, by row.
        reference: those under the reference, by row, or None."""

    def __init__(
        self,
        model: Any,
        moments: tuple[Any, Any] | None,
        num_updates: int,
        rows: Sequence[Row],
        old: Sequence[Tensor],
        reference: Sequence[Tensor] | None,
    ) -> None:
        self.model, self.rows = model, rows
        self._old, self._reference = old, reference
        self._count = num_updates
        self._parameters = dict(model.named_parameters())
        if moments is None:
            zeros = {name: torch.zeros_like(each) for name, each in self._parameters.items()}
            self._first = zeros
            self._second = {name: each.clone() for name, each in zeros.items()}
        else:
            self._first, self._second = (
                {name: each.detach().clone() for name, each in one.named_parameters()}
                for one in moments
            )

    def run(
        self, minibatches: Sequence[Sequence[int]], loss: LossRules, adam: AdamRules
    ) -> list[Update]:
        """Make one update on each mini-batch and return what it measures.

        Args:
            minibatches: the rows of each.
            loss: the loss.
            adam: the optimizer; a learning rate for each mini-batch."""
        return [
            self._update(rows, loss, adam, rate)
            for rows, rate in zip(minibatches, adam.learning_rates, strict=True)
        ]

    def _update(
        self, indices: Sequence[int], loss: LossRules, adam: AdamRules, rate: float
    ) -> Update:
        trained = [at for at in indices if self.rows[at].is_trained]
        totals = Totals()
        totals.denominator = self._denominator(trained, loss)
        self.model.zero_grad()
        vocabulary = self.model.config.vocab_size
        for batch in _batches([self.rows[at] for at in trained], vocabulary):
            members = [trained[at] for at in batch]
            terms = torch.zeros((), dtype=torch.float64)
            rows = [self.rows[at] for at in members]
            for at, logits in zip(members, _logits(self.model, rows), strict=True):
                terms = terms + self._row(at, logits, loss, totals)
            terms.backward()
        norm = math.sqrt(
            sum(
                float(each.grad.double().square().sum())
                for each in self._parameters.values()
                if each.grad is not None
            )
        )
        self._step(adam, rate, norm)
        n, count = totals.denominator, max(1, totals.num_tokens)
        parts = {
            "policy": totals.policy / n,
            "kl": totals.kl / n,
            "entropy": totals.entropy / n,
        }
        metrics = {
            "loss": sum(parts.values()),
            "kl": totals.kl_sum / count,
            "entropy": totals.entropy_sum / count,
            "clip_fraction": totals.clipped / count,
            "ratio/max": totals.largest_ratio,
            "grad_norm": norm,
        }
        if loss.importance_cap is not None:
            metrics["importance"] = totals.importance / count
        return Update(metrics, parts)

    def _denominator(self, indices: Sequence[int], loss: LossRules) -> float:
        rows = [self.rows[at] for at in indices]
        if loss.average == "token" and loss.counts_prompts:
            count = sum(len(row.token_ids) for row in rows)
        elif loss.average == "token":
            count = sum(int(row.is_sampled.sum()) for row in rows)
        else:
            count = len({row.response for row in rows})
        return max(1, count)  # A substitution may leave out all responses of a mini-batch.

    def _row(self, at: int, logits: Tensor, loss: LossRules, totals: Totals) -> Tensor:
        """Return a row's part of the loss, differentiable, and add to the sums."""
        row = self.rows[at]
        own, entropy = _of_tokens(logits, row, loss.temperature)
        # An update on the first mini-batch begins at the old policy.
        x = own - self._old[at]
        if loss.is_sequence_ratio:
            x = x.mean().expand_as(x)
        ratio = x.exp()
        clipped = ratio.clamp(1 - loss.clip_low, 1 + loss.clip_high)
        a = row.advantage
        if loss.is_cispo:
            surrogate = clipped.detach() * a * own
            is_clipped = clipped != ratio
        else:
            surrogate = torch.minimum(ratio * a, clipped * a)
            is_clipped = clipped * a < ratio * a
            if loss.dual_clip is not None and a < 0:
                is_clipped = is_clipped | (surrogate < loss.dual_clip * a)
                surrogate = surrogate.clamp(min=loss.dual_clip * a)
        v = torch.ones_like(own)
        if loss.importance_cap is not None:
            v = (self._old[at] - row.logprobs.double()).exp().clamp(max=loss.importance_cap)
        kl = torch.zeros_like(own)
        if self._reference is not None:
            g = self._reference[at] - own
            kl = {"k1": -g, "k2": g * g / 2, "k3": g.expm1() - g}[loss.kl_estimator]
        length = len(row.token_ids) if loss.counts_prompts else row.num_sampled
        weight = {"token": 1.0, "sequence": 1 / max(1, length), "constant": 1 / loss.constant}
        w = weight[loss.average]
        parts = (
            -w * (v * surrogate).sum(),
            w * loss.kl_beta * kl.sum(),
            -w * loss.entropy_coef * entropy.sum(),
        )
        totals.policy += float(parts[0].detach())
        totals.kl += float(parts[1].detach())
        totals.entropy += float(parts[2].detach())
        totals.num_tokens += len(own)
        totals.kl_sum += float(kl.detach().sum())
        totals.entropy_sum += float(entropy.detach().sum())
        totals.clipped += float(is_clipped.sum())
        totals.importance += float(v.sum())
        if len(own):
            totals.largest_ratio = max(totals.largest_ratio, float(ratio.detach().max()))
        return (parts[0] + parts[1] + parts[2]) / totals.denominator

    @torch.no_grad()
    def _step(self, adam: AdamRules, rate: float, norm: float) -> None:
        self._count += 1
        scale = min(1.0, adam.clip_grad / (norm + 1e-6))
        first_bias = 1 - adam.beta1**self._count
        second_bias = 1 - adam.beta2**self._count
        for name, parameter in self._parameters.items():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gradient = gradient * scale
            m = self._first[name].lerp_(gradient, 1 - adam.beta1)
            v = self._second[name].mul_(adam.beta2).add_(gradient.square() * (1 - adam.beta2))
            if parameter.dim() > 1 and not name.endswith("bias"):  # as norms and biases do not
                parameter.mul_(1 - rate * adam.weight_decay)
            parameter.sub_(rate / first_bias * m / ((v / second_bias).sqrt() + adam.epsilon))


@torch.no_grad()
def distances(a: Any, b: Any, base: Any) -> dict[str, tuple[float, float]]:
    """Return of every parameter and buffer the norm of a - b, and that of b - base, float64.

    Args:
        a: a model.
        b: another with the same parameters.
        base: the model that both come from."""
    others, bases = b.state_dict(), base.state_dict()
    return {
        name: (
            float((each.double() - others[name].double()).norm()),
            float((others[name].double() - bases[name].double()).norm()),
        )
        for name, each in a.state_dict().items()
        if each.is_floating_point()
    }


@torch.no_grad()
def relative_distance(a: Any, b: Any) -> float:
    """Return |a - b| / |b| over all parameters and buffers of two models."""
    others = b.state_dict()
    apart = size = 0.0
    for name, each in a.state_dict().items():
        if not each.is_floating_point():
            continue
        other = others[name].double()
        apart += float((each.double() - other).square().sum())
        size += float(other.square().sum())
    return math.sqrt(apart / size) if size else math.sqrt(apart)
