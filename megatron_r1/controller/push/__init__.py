"""The controller's part of a push: `WeightPusher` (`pusher`) calls trainer ranks and engines.

`engine_links` divides the engines into sets and connects these with the trainer. A `Prober`
(`prober`) compares the log-probabilities of both after a push. No weight passes here: trainer ranks
send theirs to the engine ranks themselves (`megatron_r1.push`)."""
