"""Lost trainer ranks: start all of them again and go on from the newest good checkpoint.

Engines and reward workers live on meanwhile, and the sample log has what was sampled, so what is
done again is the training of the steps since the checkpoint.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from megatron_r1.errors import TrainerLost
from megatron_r1.training.client import TrainerClient
from megatron_r1.training.recorder import Recorder


async def with_restarts(
    attempt: Callable[[], Awaitable[None]],
    trainer: TrainerClient,
    recorder: Recorder,
    most: int,
) -> None:
    """Run `attempt`, and again each time ranks are lost in it, `most` times in all.

    attempt: goes on from `recorder`'s checkpoint with ranks that know nothing yet. Raises what it
    raises; TrainerLost where no restart is left, or others started the ranks (torchrun, which
    restarts them together with the controller).
    """
    while True:
        try:
            return await attempt()
        except TrainerLost as loss:
            await _restart(loss, trainer, recorder, most)


async def _restart(
    loss: TrainerLost, trainer: TrainerClient, recorder: Recorder, most: int
) -> None:
    while True:
        if not trainer.can_restart or trainer.num_restarts >= most:
            raise loss
        count = f"restart {trainer.num_restarts + 1} of at most {most}"
        recorder.view.message(f"{loss}\nstarting the trainer ranks again, {count}")
        trainer.kill()
        recorder.go_back()
        recorder.view.phase("restarting trainer", f"to go on after step {recorder.state.step}")
        try:
            return await trainer.restart()
        except TrainerLost as again:
            loss = again
