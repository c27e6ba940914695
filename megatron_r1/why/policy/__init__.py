"""The policy in transformers: models of checkpoints, and what they make of logged tokens.

- Weights: `checkpoint_model` reads those of a checkpoint as a whole model, `tensor_source` one by
  one, `checkpoint_tensors` checks them; `transformers_adapters`, `model_distance`.
- Tokens: `token_rows`, the inputs of a model.
- One model: `token_logprobs` gives log-probabilities of rows, `routed_experts` the experts that
  routers choose, `expert_replay` makes them choose the engine's; `streamed_model` gives the same of
  a model that does not fit into memory.
- All models of a step: `step_models`; `policy_writer` writes one as a folder.
- The log-probabilities of a step's tokens: `step_logprobs`, with other weights `changed_weights`
  and `changed_parts`, as engines have them with `push.fp8` `fp8_engines`."""
