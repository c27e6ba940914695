"""Episodes of several turns (docs/agents.md). `player` plays an episode in an environment, and
`harness` one of an agent that calls the policy through the `gateway`; `token_tree` and
`continuation` keep its tokens; `environment`, `environment_pool` and `environment_server` are the
form of an environment and its process, `shipped_environments` and `verifiers` those that exist, and
`answer_parser` reads an answer's tool calls."""
