"""A trainer rank: the one train step that SFT, RL and reward models share, SPMD ranks driven over
ZeroMQ. The controller's side is `megatron_r1.controller.trainer_calls`.

    rank.py, worker.py                    a rank's process, and its loop over the controller's calls
    rank_monitor.py, collectives.py       what a rank does, and which collective it waits in
    wire.py, sample.py                    messages and samples, for both sides
    distributed.py                        process groups, a rank's position
    replica.py                            the samples of a model replica, sent by its first rank
    trainer.py, critic.py                 the operations of a step
    construction.py, optimizer.py         model chunks, gradient buffers, Adam
    batch.py                              the tensors of a packed micro-batch
    packed.py, packed_routing.py,
    shared_prompts.py                     samples packed into one
    passes.py                             Megatron's schedule, and the step around it
    head.py, scores.py                    what a loss gets
    losses.py, reward_losses.py,
    value_loss.py                         losses, and what they return
    returns.py, token_advantages.py       advantages that are computed on the ranks
    metrics.py                            means over micro-batches and ranks
    reference.py                          the reference policy's weights
    folders.py, checkpoints/              exports and checkpoints
    implementations.py                    the layers and kernels in use"""
