"""Overlaps the exchange of tokens between experts' ranks with another micro-batch's computation.

With `parallel.overlap_expert_exchange` Megatron's schedule runs the forward pass of one micro-batch
and the backward pass of another layer by layer together (combined_1f1b.py, Megatron-Core 0.19.2),
each layer cut where its tokens leave for the experts and come back. DualPipe (arXiv 2412.19437,
section 3.2.1) overlaps the same parts. `OverlapSchedulePlan` is a chunk's list of these parts.

It differs from Megatron's plan in what our models need:
- The last stage returns hidden states in their own dtype, not fp32.
- MTP layers take packed batches, which Megatron's parts of them refuse
  (common/fine_grained_callables.py:88). They are one part, whose exchange is not hidden.
- The final norm is also applied behind a dense layer; Megatron's is part of a sparse layer's end.
- The embedding's output has a gradient where the embedding is frozen (LoRA)."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.common.model_chunk_schedule_plan import TransformerModelChunkSchedulePlan
from megatron.core.models.common.utils import PostProcessNode, PreProcessNode
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel.utils import NoopScheduleNode, ScheduleNode
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor


class _Inputs(PreProcessNode):
    def forward_impl(self) -> Tensor:
        hidden = super().forward_impl()
        # The first layer's parts ask for the gradient of their input.
        return hidden if hidden.requires_grad else hidden.detach().requires_grad_()


class _Outputs(PostProcessNode):
    def forward_impl(self, hidden_states: Tensor) -> Tensor:
        state = self.chunk_state
        return self.model._postprocess(
            hidden_states,
            labels=state.labels,
            loss_mask=state.loss_mask,
            mtp_in_postprocess=False,
            packed_seq_params=state.packed_seq_params,
        )


class OverlapSchedulePlan(TransformerModelChunkSchedulePlan):
    """The parts of one micro-batch's passes through a chunk, in the order in which they run."""

    PRE_PROCESS_NODE_CLASS = _Inputs
    POST_PROCESS_NODE_CLASS = _Outputs

    def _build_layer_schedule_plan(
        self, module: Any, comp_stream: torch.cuda.Stream, comm_stream: torch.cuda.Stream
    ) -> None:
        model = self.state.model
        if module is not model.decoder:
            # Without labels the MTP layers are not run.
            if module is not None and self.state.labels is not None:
                self._append_unsplit(self._run_mtp, comp_stream)
            return
        super()._build_layer_schedule_plan(module, comp_stream, comm_stream)
        ends_sparse = bool(module.layers) and isinstance(module.layers[-1].mlp, MoELayer)
        if module.final_layernorm is not None and not ends_sparse:
            self._append_unsplit(module.final_layernorm, comp_stream)

    def _append_unsplit(
        self, function: Callable[[Tensor], Tensor], stream: torch.cuda.Stream
    ) -> None:
        config = self.state.model.config
        self._transformer_layers.append(_UnsplitLayer(function, config, stream, self.event))

    def _run_mtp(self, hidden: Tensor) -> Tensor:
        """Return hidden (s, b, h) with the MTP layers' states behind them."""
        state = self.state
        context = {
            name: getattr(state, name)
            for name in (
                "input_ids",
                "position_ids",
                "attention_mask",
                "packed_seq_params",
                "rotary_pos_emb",
                "rotary_pos_cos",
                "rotary_pos_sin",
                "sequence_len_offset",
            )
        }
        return state.model._with_predictions(hidden, context)


class _EmptyNode(NoopScheduleNode):
    def backward_dw(self) -> None:
        """Compute no weight gradient: there is no weight."""


class _UnsplitNode(ScheduleNode):
    def backward_dw(self) -> None:
        """Compute no weight gradient: the backward pass has done so."""


class _UnsplitLayer:
    """Takes the place of a layer in a plan, and is not cut: it runs where a layer's experts do."""

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        config: Any,
        stream: torch.cuda.Stream,
        event: torch.cuda.Event,
    ):
        self.config = config
        self.mlp: Any = _UnsplitNode(function, stream, event, name="whole part")
        self.moe_dispatch = self.moe_combine = self.mtp_post_process = NoopScheduleNode()
        self.pre_dispatch_computation = _EmptyNode()

    def get_low_precision_context(self) -> contextlib.AbstractContextManager[None]:
        """Return no context: FP8 layers inside have their own."""
        return contextlib.nullcontext()

    def release_state(self) -> None:
        """Drop the part's tensors."""
        self.mlp = None


class SchedulableModel(GPTModel):
    """GPTModel whose passes Megatron's schedule can run in parts."""

    def build_schedule_plan(self, *args: Any, **kwargs: Any) -> OverlapSchedulePlan:
        """Return the parts of a forward and a backward pass; nothing is computed yet.

        Args:
            *args: as for the model itself.
            **kwargs: as for the model itself."""
        return OverlapSchedulePlan(self, *args, **kwargs)
