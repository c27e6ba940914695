"""Second readers: whether an answer is right, without the rules of `math` and `reading`.

An audit compares their verdicts with those that a run has logged
(`megatron_r1.evaluation.verifier_errors`). They share as little as possible with the reward:
`places` finds the answer, `answer_texts` parses it, `formulas` evaluates it, and `mathematics`
joins them with math-verify. A reader that is not sure says so. They run in workers of a
`RewardPool`."""
