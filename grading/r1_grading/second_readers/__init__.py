"""Second readers: whether an answer is right, without the rules of `math` and `reading`.

An audit compares their verdicts with those that a run has logged
(`megatron_r1.evaluation.verifier_errors`). They share as little as possible with the reward:
`mathematics` finds the answer and asks math-verify, `answer_texts` parses it and `formulas`
evaluates it. A reader that is not sure says so. They run in workers of a `RewardPool`."""
