"""How the ranks of several equal engines, a *set*, and those of the trainer agree on the plan, once
per set, and on a failure, during a push.

All sides use a torch.distributed store that the trainer hosts. Keys begin with the set's name,
which is new for every set. Trainer rank 0 reads the tables of all engine ranks and passes them on
to the other trainer ranks. The plan of a position is one key, which is read by the ranks at that
position, one of each engine. So a rank makes a handful of requests to the store, whatever the
number of ranks.

`base` has what every side does, `engine`, `trainer` and `controller` what one side does; `offers`,
`tables` and `failure` are what they publish for each other."""
