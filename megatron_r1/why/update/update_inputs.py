"""Collects what a step's updates are made of, as the settings say or with a candidate cause.

These are the policy with its optimizer's state, the rows of each mini-batch, their
log-probabilities, and the rules of loss and optimizer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_r1.controller.trainer_calls.packing import pack_samples
from megatron_r1.models.compute_cost import sample_cost
from megatron_r1.why.comparison import CannotRecompute
from megatron_r1.why.policy import checkpoint_model, token_logprobs
from megatron_r1.why.policy.step_logprobs import StepLogprobs
from megatron_r1.why.policy.token_rows import TokenRow, row_with_prompt, rows_with_own_experts
from megatron_r1.why.policy.transformers_adapters import trained_parameters
from megatron_r1.why.record.recorded_step import weights_after
from megatron_r1.why.update.adam import AdamRules, Moments
from megatron_r1.why.update.candidate_cause import CandidateCause
from megatron_r1.why.update.first_update import FirstUpdate, first_update
from megatron_r1.why.update.loss_formulas import LossRules
from megatron_r1.why.update.loss_terms import LossTerm, left_out_terms, loss_terms
from megatron_r1.why.update.recomputed_token_advantages import with_token_advantages

UPDATE_FLOPS = 2e13
"""Floating-point operations of a step's updates: minutes on two cores. More are not made."""
PARAMETER_COPIES = 7
"""Copies of the parameters, fp32, that the updates need: model, gradients, moments, and others."""


class UpdateInputs:
    """What the updates of a recorded step are made of.

    Args:
        policies: the step's policies, with the log-probabilities of its tokens.

    Raises:
        CannotRecompute: weights are missing, or too large for this machine.
    """

    def __init__(self, policies: StepLogprobs) -> None:
        self.step, self.models, self.policies = policies.step, policies.models, policies

    @cached_property
    def moments(self) -> tuple[Moments, Moments] | None:
        """Adam's first and second moments before the step; None before the run's first."""
        return None if self.models.is_first_step else self.moments_in(self.models.checkpoint_before)

    @property
    def first_moments(self) -> Moments:
        """Adam's first moments before the step; a parameter that is missing has zeros."""
        return self.moments[0] if self.moments else {}

    def moments_in(self, checkpoint: Path) -> tuple[Moments, Moments]:
        """Return the first and second moments in a checkpoint, by parameter."""
        first, second = (
            trained_parameters(
                self.models.model(checkpoint, f"{checkpoint_model.STATE_PREFIX}{name}.")
            )
            for name in checkpoint_model.MOMENT_NAMES
        )
        return {k: moment.detach() for k, moment in first.items()}, {
            k: moment.detach() for k, moment in second.items()
        }

    @cached_property
    def num_updates(self) -> int:
        """Updates before the step, as the checkpoint's optimizer has counted them."""
        if self.models.is_first_step:
            return 0
        return checkpoint_model.read_state(self.models.checkpoint_before) or 0

    def check_updates(self) -> None:
        """Raise CannotRecompute where the step's updates cannot be made here."""
        config = self.step.config
        before = self.models.checkpoint_before
        reasons = (
            (
                self.step.rules.recomputed_baseline is None,
                f"rl.algorithm: {config.rl.algorithm}: its rules have no recomputed_baseline",
            ),
            (
                bool(config.rl.routing_replay and config.model.expert_bias_update_rate),
                "rl.routing_replay with model.expert_bias_update_rate: which experts unread tokens "
                "are counted for depends on the packing",
            ),
            (
                bool(config.model.lora and self.models.is_first_step),
                "model.lora: the factors that the first step begins with are not read",
            ),
            (config.fp8.recipe != "none", f"fp8.recipe: {config.fp8.recipe}"),
        )
        for applies, reason in reasons:
            if applies:
                raise CannotRecompute(reason)
        cost = 4.0 * self.models.pass_flops
        if cost > UPDATE_FLOPS:
            raise CannotRecompute(
                f"the updates take {cost / 1e12:,.0f} teraflops here, at most "
                f"{UPDATE_FLOPS / 1e12:.0f} are spent"
            )
        num_bytes = max(4 * PARAMETER_COPIES * self.models.num_parameters, self.models.model_bytes)
        free_bytes = self.models.free_bytes
        if num_bytes > free_bytes or self.models.is_streamed:
            raise CannotRecompute(
                f"the updates need {num_bytes / 1e9:,.1f} GB, {4 * PARAMETER_COPIES} bytes a "
                f"parameter or a whole model with its logits, {free_bytes / 1e9:,.1f} GB are "
                "free"
            )
        if (
            config.rl.kl_beta
            and not self.models.is_first_step
            and not checkpoint_model.has_part(before, checkpoint_model.REFERENCE_PREFIX)
        ):
            raise CannotRecompute(f"{before} has no reference policy")

    def minibatches(self, token_rows: Sequence[TokenRow] | None = None) -> list[list[int]]:
        """Return the rows of each mini-batch: responses in an order of the run's seed and step,
        those that are trained on spread evenly.

        Args:
            token_rows: the rows; None: the step's."""
        token_rows = token_rows or self.models.rows
        by_response: dict[Any, list[int]] = {}
        for index, sequence in enumerate(self.models.sequences):
            by_response.setdefault(sequence.response, []).append(index)
        response_rows = list(by_response.values())
        random.Random(f"{self.step.run_config.run.seed}:{self.step.step}").shuffle(response_rows)
        trained_responses = [rows for rows in response_rows if token_rows[rows[0]].is_trained]
        count, num_trained = self.step.config.rl.minibatches, len(trained_responses)
        return [
            [
                index
                for rows in trained_responses[
                    i * num_trained // count : (i + 1) * num_trained // count
                ]
                for index in rows
            ]
            for i in range(count)
        ]

    @cached_property
    def trained_model(self) -> Any:
        """What the optimizer changes: the policy, of 16 bits its master weights."""
        if self.step.run_config.model.dtype == "float32" or self.models.is_first_step:
            return self.models.policy
        return self.models.model(
            self.models.checkpoint_before, f"{checkpoint_model.STATE_PREFIX}param."
        )

    @cached_property
    def first_update(self) -> FirstUpdate | None:
        """The forward passes of the first update; None where its graph is too large to keep."""
        return first_update(
            self.trained_model,
            self.models.rows,
            self.minibatches()[0],
            self.models.num_parameters,
        )

    @cached_property
    def packed_rows(self) -> list[list[list[list[int]]]]:
        """The rows by update, data-parallel rank and micro-batch, as the controller packs them;
        nothing where micro-batches share prompts."""
        parallel = self.step.run_config.parallel
        if parallel.share_prompts:
            return []
        ranks = parallel.data_parallel_size(parallel.processes)
        cost = sample_cost(self.step.hf_config)
        batches = []
        for rows in self.minibatches():
            lengths = [len(self.models.rows[index].token_ids) for index in rows]
            packing = pack_samples(lengths, ranks, parallel.microbatch_tokens, cost=cost)
            batches.append(
                [[[rows[index] for index in m] for m in share] for share in packing.shares]
            )
        return batches

    def shares(self) -> list[tuple[str, list[int]]]:
        """Return the rows of each data-parallel rank, and of the first and the last micro-batch of
        each, with a name; nothing for one rank with one micro-batch."""
        share_by_key: dict[str, list[int]] = {}
        for update in self.packed_rows:
            for rank, share in enumerate(update):
                if len(update) > 1:
                    row_numbers = [index for members in share for index in members]
                    share_by_key.setdefault(f"data-parallel rank {rank}", []).extend(row_numbers)
                if len(share) > 1:
                    share_by_key.setdefault("the first micro-batch", []).extend(share[0])
                    share_by_key.setdefault("the last micro-batch", []).extend(share[-1])
        return list(share_by_key.items())

    def loss_rules(self) -> LossRules:
        """Return the loss of the step's settings."""
        rl, limit = self.step.config.rl, self.step.config.rollout.max_response_tokens
        mask = rl.engine_mask_settings
        return LossRules(
            average=rl.loss_average,
            constant_length=limit,
            clip_low=rl.clip_low,
            clip_high=rl.clip_high,
            dual_clip=rl.dual_clip,
            is_sequence_ratio=rl.ratio_level == "sequence",
            is_cispo=rl.algorithm == "cispo",
            importance_cap=rl.importance_cap,
            kl_beta=0.0 if self.step.rules.kl_in_reward else rl.kl_beta,
            kl_estimator=rl.kl_estimator,
            entropy_coef=rl.entropy_coef,
            temperature=self.policies.temperature,
            divergence=(mask.low, mask.high) if mask.method == "divergence" else None,
        )

    @cached_property
    def loss_terms(self) -> list[LossTerm]:
        """The terms of the loss whose gradients are computed one by one."""
        return [
            *loss_terms(self.step, self.models.rows, self.loss_rules()),
            *left_out_terms(
                self.step,
                lambda rows: with_token_advantages(
                    self.step,
                    rows,
                    self.policies.all_old_logprobs,
                    self.policies.ref_logprobs,
                ),
                self.minibatches,
                self.models.rows,
            ),
        ]

    def adam_rules(self, norms: tuple[float, ...] | None) -> AdamRules:
        """Return the optimizer of the step's settings.

        Args:
            norms: `AdamRules.norms`; None: those of the gradients."""
        settings = self.step.config.optimizer
        return AdamRules(
            tuple(self.step.learning_rates),
            settings.beta1,
            settings.beta2,
            settings.epsilon,
            settings.weight_decay,
            settings.clip_grad,
            norms=norms,
        )

    @property
    def trains_mtp_layers(self) -> bool:
        """Whether the run trains parameters that are not here, as those of MTP layers."""
        return self.step.config.model.mtp == "train"

    @property
    def left_out_note(self) -> str:
        """What of the gradient is not computed here, for a remedy; "" where all is."""
        if not self.trains_mtp_layers:
            return ""
        return (
            "; the only gradient that is not recomputed is that of the MTP layers' loss, which "
            "must not reach the others (model.mtp)"
        )

    def candidate_rows(self, candidate: CandidateCause) -> list[TokenRow]:
        """Return the rows with what a candidate cause changes of them."""
        rows = self.models.rows
        if candidate.advantages is not None:
            rows = [
                replace(row, advantage=candidate.advantages[index[0]][index[1]])
                for row, index in zip(
                    rows, (sequence.response for sequence in self.models.sequences), strict=True
                )
            ]
        if candidate.trains_prompts:
            rows = [row_with_prompt(row) for row in rows]
        return rows_with_own_experts(rows) if candidate.routes_itself else rows

    def old_and_ref_logprobs(
        self, candidate: CandidateCause, rows: Sequence[TokenRow], loss: LossRules
    ) -> tuple[list[Tensor], list[Tensor] | None]:
        """Return log-probabilities of the rows under old policy and reference.

        Args:
            candidate: what is computed otherwise than in the run.
            rows: prompts with responses.
            loss: the rules of the loss; its temperature counts.

        Returns:
            Both, a tensor per row; the second None without a reference."""
        is_own = loss.temperature == self.policies.temperature and not candidate.trains_prompts
        old_logprobs, temperatures = self.policies.all_old_logprobs, [loss.temperature]
        if not is_own or candidate.routes_itself:
            old_logprobs = token_logprobs.sampled_logprobs(self.models.policy, rows, temperatures)[
                0
            ]
        if not candidate.reference and (is_own or self.policies.ref_logprobs is None):
            return old_logprobs, self.policies.ref_logprobs
        if candidate.reference == "begin":
            begin = weights_after(self.step.folder, self.step.run_config, 0)
            assert begin is not None, "the substitution is offered where the model is there"
            model = self.models.model(begin)
        elif candidate.reference == "policy" or self.models.is_first_step:
            if not self.step.config.rl.routing_replay:
                return old_logprobs, old_logprobs
            model = self.models.policy
        else:
            model = self.models.reference_model
        rows = rows_with_own_experts(rows)
        return old_logprobs, token_logprobs.sampled_logprobs(model, rows, temperatures)[0]

    def candidate_moments(self, candidate: CandidateCause) -> tuple[Moments, Moments] | None:
        """Return the moments, those of the embedding for a head that is a tensor of its own."""
        if not candidate.unties_head or self.moments is None:
            return self.moments
        embedding = "model.embed_tokens.weight"
        first, second = ({**moment, "lm_head.weight": moment[embedding]} for moment in self.moments)
        return first, second

    def update_rows(self, candidate: CandidateCause, rows: Sequence[TokenRow]) -> list[list[int]]:
        """Return the rows of each update."""
        minibatches = self.minibatches(rows)
        return [minibatches[0]] * len(minibatches) if candidate.repeats_first else minibatches
