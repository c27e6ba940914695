"""How often lost trainer ranks are started again."""

import asyncio
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

from megatron_r1.base.errors import TrainerLost
from megatron_r1.config import Config
from megatron_r1.controller.supervision.supervisor import Supervisor
from megatron_r1.engines.server.errors import EngineError


class LosingTrainer(SimpleNamespace):
    """A trainer whose ranks can be started again."""

    can_restart, num_restarts, num_replies, pending_call = True, 0, 0, None

    def kill(self):
        pass

    async def restart(self):
        self.num_restarts += 1


@pytest.mark.parametrize("most", [0, 2])
def test_ranks_are_lost_for_good_when_no_restart_is_left(most):
    trainer, lost = LosingTrainer(), TrainerLost("rank 1 ended")

    async def lose_again_and_again():
        while True:
            await supervisor.restart_trainer(lost)

    config = Config().with_changes(run={"max_trainer_restarts": most})
    supervisor = Supervisor(config, MagicMock(), trainer, spans_nodes=False)
    with pytest.raises(TrainerLost) as error:
        asyncio.run(lose_again_and_again())
    assert error.value is lost and trainer.num_restarts == most


@pytest.mark.parametrize("refuses", [False, True])
def test_engines_sleep_when_no_rank_of_the_lost_trainer_allocates_any_more(refuses):
    """vLLM's sleep fails where less of the GPU is free after it than before."""
    done, messages = [], []

    class Trainer(LosingTrainer):
        def kill(self):
            done.append("kill")

        async def restart(self):
            done.append("restart")

    class Fleet:
        async def sleep(self):
            done.append("sleep")
            if refuses:
                raise EngineError("engine-0 refuses")

    recorder = MagicMock()
    recorder.view.show_message = messages.append
    config = Config().with_changes(rollout={"colocated": True, "gpu_memory": 0.3})
    supervisor = Supervisor(config, recorder, Trainer(), spans_nodes=False)
    supervisor.watch_rollouts(SimpleNamespace(fleet=Fleet()))
    asyncio.run(supervisor.restart_trainer(TrainerLost("rank 1 ended")))
    assert done == ["kill", "sleep", "restart"]
    assert sum("engine-0" in message for message in messages) == refuses
