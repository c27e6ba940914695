"""The policy in transformers: models of checkpoints, and what they make of logged tokens.

- Weights: `checkpoint_tensors` checks them, `tensor_source` reads them one by one, and
  `checkpoint_model` as a model; `transformers_adapters`, `model_distance`.
- Models of a step: `policy_models`, whole or as a `streamed_model`.
- Log-probabilities: `token_logprobs` by a model, also of changed rows; `policy_logprobs` of a step,
  with other weights (`changed_weights`, `fp8_engines`).
- Experts: `routed_experts`."""
