"""Episodes of several turns (docs/agents.md).

- Who plays: `player` in an environment, `harness` with an agent that calls the policy through the
  `gateway`.
- The episode's tokens: `token_tree`, `continuation` with `conversation_matching`; a turn's tool
  calls: `turn_parsing`, by the `hermes_parser` or by a `parser_pool` of processes
  (`parser_worker`), which return a `parsed_turn`.
- Environments: `environment` is their form, with the `tool_schemas` of their methods and the
  `method_arguments` of calls; `shipped_environments` and `verifiers` are those that exist,
  `environment_prompts` their questions; `environment_pool` and `environment_server` are the two
  sides of their processes."""
