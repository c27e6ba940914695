"""What transformers computes of a step, once and when it is asked for: log-probabilities under the
policy before the step, the one before that, and the reference; and the step's updates, as the
settings say or with one thing substituted."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from megatron_r1.commands.why import formulas, policy_model
from megatron_r1.commands.why.comparison import CannotRecompute
from megatron_r1.commands.why.policy_logprobs import PolicyLogprobs
from megatron_r1.commands.why.policy_model import Row
from megatron_r1.commands.why.recorded import RecordedStep, weights_after
from megatron_r1.commands.why.substitution import Substitution
from megatron_r1.commands.why.token_advantages import with_token_advantages
from megatron_r1.commands.why.updates import (
    Adam,
    AdamRules,
    LossRules,
    Moments,
    StepUpdates,
    Totals,
    Update,
    denominator,
    row_loss,
)
from megatron_r1.controller.trainer_calls.packing import pack, sample_cost

UPDATE_FLOPS = 2e13
"""Floating-point operations of a step's updates: minutes on two cores. More are not made."""
KNOWN = (*formulas.ALGORITHMS, *formulas.OF_TOKENS)
"""Algorithms whose updates are made again."""
CLIPPED = 1.001
"""Times the largest norm, above which a gradient was clipped by more than rounding."""
MOST_FITS, FIT = 6, 1e-5
"""Rounds in which the norms of gradients are fitted, and the relative change that ends them."""
NO_ESTIMATE = 1.05
"""Of what needs a model: tried behind what seems to explain everything."""
COPIES = 7
"""Copies of the parameters, fp32, that the updates need: model, gradients, moments, and others."""


@dataclass(frozen=True)
class RecomputedUpdates:
    """The updates of a step, made again.

    Attributes:
        metrics: as metrics.jsonl has them, over the updates.
        terms: the magnitude of each term of the loss, mean over the updates.
        signed_terms: each term with its sign, mean over the updates.
        update: |own - run's| / |run's change| of all parameters; None without a checkpoint after.
        by_parameter: by name, the same of each, largest first.
        moments: |own - run's| / |run's| of Adam's first or second moments, the larger one, after
            the step; None where no checkpoint has them."""

    metrics: dict[str, float]
    terms: dict[str, float]
    signed_terms: dict[str, float]
    update: float | None
    by_parameter: list[tuple[str, float]]
    moments: float | None = None


@dataclass(frozen=True)
class Evidence:
    """What a checkpoint after the step says of how the run's updates differ from the recomputed.

    Attributes:
        rate: the multiple of the recomputed change of the weights that is nearest to the run's;
            None where even that is far from it.
        gradient: the same of the gradients in Adam's first moments.
        still: parameters whose moments have no gradient in the run, though they have one when
            recomputed.
        norm: the norm of the recomputed gradient, mean over the updates.
        terms: the recomputed terms of the loss, with their signs, mean over the updates."""

    rate: float | None = None
    gradient: float | None = None
    still: tuple[str, ...] = ()
    norm: float = 0.0
    terms: Mapping[str, float] = field(default_factory=dict)


class Recomputation(PolicyLogprobs):
    """Recomputes a recorded step: log-probabilities under the policies that it used, and updates.

    Attributes:
        searches_causes: whether updates that depart are made again with substitutions: not where
            something before them departs, which may be why.

    Raises:
        CannotRecompute: weights are missing, or too large for this machine.
    """

    def __init__(self, step: RecordedStep) -> None:
        super().__init__(step)
        self.searches_causes = True

    @cached_property
    def _moments(self) -> tuple[Moments, Moments] | None:
        return None if self._is_begin else self._moments_of(self._before)

    def _moments_of(self, checkpoint: Path) -> tuple[Moments, Moments]:
        """Return the first and second moments in a checkpoint, by parameter."""
        first, second = (
            dict(self.model(checkpoint, f"{policy_model.STATE}{name}.").named_parameters())
            for name in policy_model.MOMENTS
        )
        return {k: each.detach() for k, each in first.items()}, {
            k: each.detach() for k, each in second.items()
        }

    @cached_property
    def num_updates(self) -> int:
        """Updates before the step, as the checkpoint's optimizer has counted them."""
        return 0 if self._is_begin else policy_model.read_state(self._before) or 0

    def check_updates(self) -> None:
        """Raise CannotRecompute where the step's updates cannot be made here."""
        config = self.step.config
        before = self._before
        algorithm = config.rl.algorithm
        reasons = (
            (
                algorithm not in KNOWN,
                f"rl.algorithm: {algorithm} is none of {', '.join(sorted(KNOWN))}",
            ),
            (config.rl.routing_replay, "rl.routing_replay: experts are the engine's"),
            (config.fp8.recipe != "none", f"fp8.recipe: {config.fp8.recipe}"),
        )
        for applies, reason in reasons:
            if applies:
                raise CannotRecompute(reason)
        cost = 8.0 * self.num_parameters * sum(len(row.token_ids) for row in self.rows)
        if cost > UPDATE_FLOPS:
            raise CannotRecompute(
                f"the updates take {cost / 1e12:,.0f} teraflops here, at most "
                f"{UPDATE_FLOPS / 1e12:.0f} are spent"
            )
        needed = 4 * COPIES * self.num_parameters
        free = psutil.virtual_memory().available
        if needed > free:
            raise CannotRecompute(
                f"the updates need {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"
            )
        if (
            config.rl.kl_beta
            and not self._is_begin
            and not policy_model.has_part(before, "reference.")
        ):
            raise CannotRecompute(f"{before} has no reference policy")

    def minibatches(self, given: Sequence[Row] | None = None) -> list[list[int]]:
        """Return the rows of each mini-batch: responses in an order of the run's seed and step,
        those that are trained on spread evenly.

        Args:
            given: the rows; None: the step's."""
        given = given or self.rows
        by_response: dict[Any, list[int]] = {}
        for at, sequence in enumerate(self.sequences):
            by_response.setdefault(sequence.response, []).append(at)
        shuffled = list(by_response.values())
        random.Random(f"{self.step.run_config.run.seed}:{self.step.step}").shuffle(shuffled)
        trained = [rows for rows in shuffled if given[rows[0]].is_trained]
        count = self.step.config.rl.minibatches
        return [
            [
                at
                for rows in trained[i * len(trained) // count : (i + 1) * len(trained) // count]
                for at in rows
            ]
            for i in range(count)
        ]

    @cached_property
    def packed(self) -> list[list[list[list[int]]]]:
        """The rows by update, data-parallel rank and micro-batch, as the controller packs them;
        nothing where micro-batches share prompts."""
        parallel = self.step.run_config.parallel
        if parallel.share_prompts:
            return []
        ranks, cost = parallel.data_parallel_size(parallel.processes), sample_cost(self.step.hf)
        made = []
        for rows in self.minibatches():
            lengths = [len(self.rows[at].token_ids) for at in rows]
            packing = pack(lengths, ranks, parallel.microbatch_tokens, cost=cost)
            made.append([[[rows[at] for at in m] for m in share] for share in packing.shares])
        return made

    def shares(self) -> list[tuple[str, list[int]]]:
        """Return the rows of each data-parallel rank, and of the first and the last micro-batch of
        each, with a name; nothing for one rank with one micro-batch."""
        found: dict[str, list[int]] = {}
        for update in self.packed:
            for rank, share in enumerate(update):
                if len(update) > 1:
                    own = [at for members in share for at in members]
                    found.setdefault(f"data-parallel rank {rank}", []).extend(own)
                if len(share) > 1:
                    found.setdefault("the first micro-batch", []).extend(share[0])
                    found.setdefault("the last micro-batch", []).extend(share[-1])
        return list(found.items())

    def loss_rules(self) -> LossRules:
        """Return the loss of the step's settings."""
        rl, limit = self.step.config.rl, self.step.config.rollout.max_response_tokens
        mask = rl.engine_mask_settings
        return LossRules(
            average=rl.loss_average,
            constant=limit,
            clip_low=rl.clip_low,
            clip_high=rl.clip_high,
            dual_clip=rl.dual_clip,
            is_sequence_ratio=rl.ratio_level == "sequence",
            is_cispo=rl.algorithm == "cispo",
            importance_cap=rl.importance_cap,
            kl_beta=0.0 if rl.algorithm in formulas.OF_TOKENS else rl.kl_beta,
            kl_estimator=rl.kl_estimator,
            entropy_coef=rl.entropy_coef,
            temperature=self.temperature,
            divergence=(mask.low, mask.high) if mask.method == "divergence" else None,
        )

    def adam_rules(self, norms: tuple[float, ...] | None = None) -> AdamRules:
        """Return the optimizer of the step's settings.

        Args:
            norms: `AdamRules.norms`; None: those that fit the run."""
        settings = self.step.config.optimizer
        return AdamRules(
            tuple(self.step.learning_rates),
            settings.beta1,
            settings.beta2,
            settings.epsilon,
            settings.weight_decay,
            settings.clip_grad,
            norms=self._norms if norms is None else norms,
        )

    @property
    def trains_more(self) -> bool:
        """Whether the run trains parameters that are not here, as those of MTP layers."""
        return self.step.config.model.mtp == "train"

    @property
    def left_out(self) -> str:
        """What of the gradient is not computed here, for a remedy; "" where all is."""
        if not self.trains_more:
            return ""
        return (
            "; the only gradient that is not recomputed is that of the MTP layers' loss, which "
            "must not reach the others (model.mtp)"
        )

    @cached_property
    def _norms(self) -> tuple[float, ...] | None:
        """The norms of whole gradients, where parts of them are not computed here: those with which
        clipping gives the run's first moments from the gradients that are.

        Raises:
            CannotRecompute: there is no checkpoint after the step."""
        if not self.trains_more:
            return None
        logged = self.step.line.get("grad_norm")
        if self._first_after is None or not isinstance(logged, int | float):
            raise CannotRecompute("model.mtp: train, and no checkpoint says how gradients were cut")
        norms = (float(logged),) * self.step.config.rl.minibatches
        for _ in range(MOST_FITS):  # a later gradient depends on how the earlier ones were cut
            made, _ = self._make_updates(Substitution(""), norms)
            before, norms = norms, self._fit_gradient_norms(made)
            if max(abs(a - b) for a, b in zip(before, norms, strict=True)) <= FIT * max(norms):
                break
        return norms

    def _fit_gradient_norms(self, made: StepUpdates) -> tuple[float, ...]:
        """Return the norm of each update's whole gradient with which clipping gives the run's first
        moments, by least squares; 0: it was not clipped."""
        settings = self.step.config.optimizer
        clip, beta = settings.clip_grad, settings.beta1
        count, after = len(made.traces), self._first_after
        assert after is not None, "there is a checkpoint"
        before = self._moments[0] if self._moments else {}
        columns = [
            (1 - beta)
            * beta ** (count - 1 - index)
            * torch.cat([each.flatten() for each in trace.gradients.values()])
            for index, trace in enumerate(made.traces)
        ]
        target = [
            (after[name] - beta**count * before.get(name, torch.zeros(()))).flatten()
            for name in made.traces[0].gradients
        ]
        scales = torch.linalg.lstsq(
            torch.stack(columns, 1).double(), torch.cat(target).double()[:, None]
        ).solution[:, 0]
        return tuple(clip / float(scale) if 0 < scale < 1 else 0.0 for scale in scales)

    def run(self, substitution: Substitution | None = None) -> RecomputedUpdates:
        """Make the step's updates, with one thing substituted.

        Args:
            substitution: what is substituted; None: nothing.

        Raises:
            CannotRecompute: as `check_updates`."""
        return self._make_updates(substitution or Substitution(""))[1]

    def _make_updates(
        self, substitution: Substitution, norms: tuple[float, ...] | None = None
    ) -> tuple[StepUpdates, RecomputedUpdates]:
        """Make the updates with one thing substituted; `norms` as of `adam_rules`."""
        self.check_updates()
        rows = self._rows(substitution)
        loss = replace(self.loss_rules(), **dict(substitution.loss))
        old, reference = self._old_and_reference_logprobs(substitution, rows, loss)
        rows = with_token_advantages(self.step, rows, old, reference)
        model = copy.deepcopy(self._trained_model)
        if substitution.head_is_apart:
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        made = StepUpdates(
            model,
            None if substitution.without_moments else self._substituted_moments(substitution),
            0 if substitution.without_moments else self.num_updates,
            rows,
            old,
            reference,
            self.step.run_config.model.expert_bias_update_rate,
        )
        adam = replace(self.adam_rules(norms), **dict(substitution.adam))
        order, lost = self._order(substitution, rows), frozenset(substitution.lost)
        measured = made.run(order, loss, adam, lost)
        metrics, terms = _means(measured)
        signed = {
            name: sum(each.terms[name] for each in measured) / len(measured)
            for name in measured[0].terms
        }
        if adam.norms is not None and min(adam.norms) < CLIPPED * adam.clip_grad:
            del metrics["grad_norm"]  # of a gradient that was not clipped the norm is not known
        change, by_parameter = self._compare(model, made.adam)
        return made, RecomputedUpdates(
            metrics, terms, signed, change, by_parameter, self._moment_distance(made.adam)
        )

    def _rows(self, substitution: Substitution) -> list[Row]:
        """Return the rows with what is substituted of them."""
        rows = self.rows
        if substitution.advantages is not None:
            rows = [
                replace(row, advantage=substitution.advantages[which[0]][which[1]])
                for row, which in zip(rows, (each.response for each in self.sequences), strict=True)
            ]
        if substitution.trains_prompts:
            rows = [_with_prompt(row) for row in rows]
        return rows

    def _old_and_reference_logprobs(
        self, substitution: Substitution, rows: Sequence[Row], loss: LossRules
    ) -> tuple[list[Tensor], list[Tensor] | None]:
        """Return log-probabilities of the rows under old policy and reference."""
        is_own = loss.temperature == self.temperature and not substitution.trains_prompts
        old = self._old_of_all
        if not is_own:
            old = policy_model.logprobs(self.policy, rows, [loss.temperature])[0]
        if substitution.reference == "policy":
            return old, old
        if substitution.reference == "begin":
            begin = weights_after(self.step.folder, self.step.run_config, 0)
            assert begin is not None, "the substitution is offered where the model is there"
            return old, policy_model.logprobs(self.model(begin), rows, [loss.temperature])[0]
        if is_own or self.reference is None:
            return old, self.reference
        if self._is_begin:
            return old, old
        model = self.model(self._before, policy_model.REFERENCE)
        return old, policy_model.logprobs(model, rows, [loss.temperature])[0]

    def _substituted_moments(self, substitution: Substitution) -> tuple[Moments, Moments] | None:
        """Return the moments, those of the embedding for a head that is a tensor of its own."""
        if not substitution.head_is_apart or self._moments is None:
            return self._moments
        embedding = "model.embed_tokens.weight"
        first, second = ({**one, "lm_head.weight": one[embedding]} for one in self._moments)
        return first, second

    def _order(self, substitution: Substitution, rows: Sequence[Row]) -> list[list[int]]:
        """Return the rows of each update."""
        made = self.minibatches(rows)
        return [made[0]] * len(made) if substitution.repeats_first else made

    @cached_property
    def _unsubstituted_updates(self) -> tuple[StepUpdates, RecomputedUpdates]:
        return self._make_updates(Substitution(""))

    @property
    def base(self) -> RecomputedUpdates:
        """The updates as the settings say."""
        return self._unsubstituted_updates[1]

    @cached_property
    def evidence(self) -> Evidence:
        """What the checkpoint after the step says of how the run's updates differ from `base`."""
        after = self._model_after
        about: dict[str, Any] = {
            "norm": self.base.metrics.get("grad_norm", 0.0),
            "terms": self.base.signed_terms,
        }
        if after is None:
            return Evidence(**about)
        begin, last = dict(self._trained_model.named_parameters()), dict(after.named_parameters())
        own = dict(self._unsubstituted_updates[0].model.named_parameters())
        changes = [(last[name] - each, own[name] - each) for name, each in begin.items()]
        if self._first_after is None:
            return Evidence(_multiple(changes), **about)
        left = self.adam_rules().beta1 ** self.step.config.rl.minibatches
        before = self._moments[0] if self._moments else {}
        gradients = {
            name: tuple(
                each[name] - left * before.get(name, torch.zeros(()))
                for each in (self._first_after, self._unsubstituted_updates[0].adam.first)
            )
            for name in begin
        }
        still = tuple(
            name
            for name, (run, here) in gradients.items()
            if float(run.norm()) <= NONE * float(here.norm())
        )
        return Evidence(_multiple(changes), _multiple(list(gradients.values())), still, **about)

    def estimate(self, substitution: Substitution, logged: Mapping[str, Any]) -> float:
        """Return an estimate of how far the updates with a substitution would be from what was
        recorded: 0 near, 2 far. It takes log-probabilities and gradients from `base`.

        Args:
            substitution: what is substituted.
            logged: the step's line of metrics.jsonl."""
        made, base = self._unsubstituted_updates
        is_of_loss = bool(substitution.loss or substitution.advantages is not None)
        is_of_adam = bool(substitution.adam or substitution.without_moments)
        known = {
            name: float(logged[name])
            for name in base.metrics
            if name != "grad_norm" and isinstance(logged.get(name), int | float)
        }
        if not (is_of_loss or is_of_adam) or "temperature" in dict(substitution.loss):
            return NO_ESTIMATE
        far = 1.0
        if is_of_loss:
            rules = replace(self.loss_rules(), **dict(substitution.loss))
            rows, reference = self._rows(substitution), self._reference_of(substitution)
            rows = with_token_advantages(self.step, rows, self._old_of_all, reference)
            if [row.is_trained for row in rows] != [row.is_trained for row in self.rows]:
                return NO_ESTIMATE
            estimated = []
            for trace in made.traces:
                trained = [at for at in trace.rows if rows[at].is_trained]
                totals = Totals(denominator=denominator([rows[at] for at in trained], rules))
                for at in trained:
                    own, entropy = trace.tokens[at]
                    ref = None if reference is None else reference[at]
                    row_loss(rows[at], own, entropy, self._old_of_all[at], ref, rules, totals)
                estimated.append(totals.update(rules))
            metrics, _ = _means(estimated)
            gaps = [
                min(1.0, abs(metrics[name] - value) / max(1e-9, abs(base.metrics[name] - value)))
                for name, value in known.items()
                if name in metrics
            ]
            far = sum(gaps) / max(1, len(gaps))
        if is_of_adam and not is_of_loss and self._model_after is not None:
            return 1.0 + min(1.0, self._estimated_change(made, substitution))
        return far + 1.0

    def _reference_of(self, substitution: Substitution) -> list[Tensor] | None:
        return self._old_of_all if substitution.reference == "policy" else self.reference

    def _estimated_change(self, made: StepUpdates, substitution: Substitution) -> float:
        """Return the distance of the change that Adam makes of the gradients of `base`."""
        model = copy.deepcopy(self._trained_model)
        parameters = dict(model.named_parameters())
        lost = substitution.without_moments
        adam = Adam(parameters, None if lost else self._moments, 0 if lost else self.num_updates)
        rules = replace(self.adam_rules(), **dict(substitution.adam))
        for index, trace in enumerate(made.traces):
            if rules.forgets:
                adam.forget()
            adam.step(trace.gradients, rules, index)
        change, _ = self._compare(model, adam)
        return max(change or 0.0, self._moment_distance(adam) or 0.0)

    @cached_property
    def _trained_model(self) -> Any:
        """What the optimizer changes: the policy, of 16 bits its master weights."""
        if self.step.run_config.model.dtype == "float32" or self._is_begin:
            return self.policy
        return self.model(self._before, f"{policy_model.STATE}param.")

    @cached_property
    def _model_after(self) -> Any:
        """The same after the step; None where no checkpoint has it."""
        after, dtype = self.step.after, self.step.run_config.model.dtype
        if after is None:
            return None
        return self.model(after, "" if dtype == "float32" else f"{policy_model.STATE}param.")

    @cached_property
    def _both_after(self) -> tuple[Moments, Moments] | None:
        """Adam's moments after the step; None where no checkpoint has them."""
        after = self.step.after
        if after is None or not policy_model.has_part(after, policy_model.STATE):
            return None
        return self._moments_of(after)

    @property
    def _first_after(self) -> Moments | None:
        return None if self._both_after is None else self._both_after[0]

    @torch.no_grad()
    def _moment_distance(self, adam: Adam) -> float | None:
        if self._both_after is None:
            return None
        ratios = []
        for own, run in zip((adam.first, adam.second), self._both_after, strict=True):
            apart = sum(
                float((own[name] - each).double().square().sum()) for name, each in run.items()
            )
            size = sum(float(each.double().square().sum()) for each in run.values())
            ratios.append(_ratio(apart**0.5, size**0.5))
        return max(ratios)

    def _compare(self, model: Any, adam: Adam) -> tuple[float | None, list[tuple[str, float]]]:
        if self._model_after is None:
            return None, []
        found = policy_model.distances(model, self._model_after, self._trained_model, adam.second)
        apart = sum(gap**2 for gap, _ in found.values()) ** 0.5
        moved = sum(change**2 for _, change in found.values()) ** 0.5
        by_name = {
            name: _ratio(gap, change) for name, (gap, change) in found.items() if gap or change
        }
        ordered = sorted(by_name.items(), key=lambda item: -item[1])
        return _ratio(apart, moved), ordered


NONE = 1e-3
"""Relative size of a gradient below which there is no gradient."""
NEAR = 0.2
"""Relative distance of a change from a multiple of another, for the multiple to mean something."""


@torch.no_grad()
def _multiple(pairs: Sequence[Sequence[Tensor]]) -> float | None:
    """Return the f for which Σ |run - f own|² is least, over pairs (run, own); None where that
    leaves more than `NEAR` of it."""
    run, own, both = (
        sum(float((a.double() * b.double()).sum()) for a, b in chosen)
        for chosen in (
            [(pair[0], pair[0]) for pair in pairs],
            [(pair[1], pair[1]) for pair in pairs],
            pairs,
        )
    )
    if not own:
        return None
    factor = both / own
    left = max(0.0, run - factor * both) ** 0.5
    return factor if left <= NEAR * max(run, own * 1e-6) ** 0.5 or run < 1e-12 * own else None


def _with_prompt(row: Row) -> Row:
    """Return a row whose tokens are all trained on; the engine's log-probability of those that it
    has not sampled is 0, as in the trainer."""
    logprobs = torch.zeros(len(row.token_ids))
    logprobs[row.is_sampled] = row.logprobs
    return replace(
        row,
        is_sampled=torch.arange(len(row.token_ids)) > 0,
        logprobs=logprobs[1:],
        num_sampled=len(row.token_ids) - 1,
        kept=None,
    )


def _ratio(gap: float, change: float) -> float:
    return gap / change if change else (0.0 if gap == 0 else float("inf"))


def _means(updates: Sequence[Update]) -> tuple[dict[str, float], dict[str, float]]:
    metrics = {
        name: max(each.metrics[name] for each in updates)
        if name.endswith("/max")
        else sum(each.metrics[name] for each in updates) / len(updates)
        for name in updates[0].metrics
    }
    terms = {
        name: sum(abs(each.terms[name]) for each in updates) / len(updates)
        for name in updates[0].terms
    }
    return metrics, terms
