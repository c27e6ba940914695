"""`trainer_steps.py` with adapters: `lora_training.py MODEL OUT GRID…`, or, of another model than
wrote OUT/checkpoint: `lora_training.py refused MODEL OUT`, which writes why to OUT/refused.txt.
`lora_training.py critic MODEL OUT` saves and loads a policy with adapters and PPO's critic, and
prints the largest differences of their parameters.
"""

import sys
from pathlib import Path

import torch
import trainer_steps
from trainer_steps import LOSS, SETTINGS, config

from megatron_r1.config import Config
from megatron_r1.trainer import distributed

LORA = {"rank": 3, "alpha": 60.0}
"""A large factor, so that two updates move the policy visibly."""


def with_adapters(model: str, grid: str) -> Config:
    tree = config(model, grid).model_dump()
    tree["model"]["lora"] = LORA
    return Config.model_validate(tree)


def refused(model: str, out: Path) -> None:
    from megatron_r1.trainer.checkpoint_manager import CheckpointManager
    from megatron_r1.trainer.trainer import Trainer

    reasons, recipes = [], (with_adapters(model, "one"), config(model, "one"))
    grid_position = distributed.initialize(recipes[0].parallel, seed=0)
    for settings in recipes:
        try:
            CheckpointManager(Trainer(settings, grid_position)).load_checkpoint(
                str(out / "checkpoint"), True
            )
        except ValueError as error:
            reasons.append(str(error))
    (out / "refused.txt").write_text("\n".join(reasons))
    distributed.leave_process_groups()


def critic(model: str, out: Path) -> None:
    from megatron_r1.trainer.checkpoint_manager import CheckpointManager
    from megatron_r1.trainer.trainer import Trainer

    tree = with_adapters(model, "one").model_dump()
    settings = Config.model_validate({**tree, "rl": {"algorithm": "ppo"}})
    grid_position = distributed.initialize(settings.parallel, seed=0)
    trainer, other = Trainer(settings, grid_position), Trainer(settings, grid_position)
    trainer.refresh_reference()
    trainer_steps.load(trainer, grid_position, (1,))
    trainer.compute_values()
    trainer.update(0, LOSS, SETTINGS, 0.1)
    with torch.no_grad():
        for parameter in trainer.critic.model_chunks[0].parameters():
            assert parameter.requires_grad
            parameter.add_(1)
    folders, folder = CheckpointManager(trainer), str(out / "step_00000001")
    folders.save_checkpoint(folder, {})
    assert folders.checkpoint_progress(wait=True)["error"] is None
    CheckpointManager(other).load_checkpoint(folder, True)
    for mine, theirs in (
        (trainer.model_chunks, other.model_chunks),
        (trainer.critic.model_chunks, other.critic.model_chunks),
    ):
        pairs = zip(mine[0].parameters(), theirs[0].parameters(), strict=True)
        print("difference", max((a - b).abs().max().item() for a, b in pairs))
    distributed.leave_process_groups()


if __name__ == "__main__":
    scenes = {"refused": refused, "critic": critic}
    if sys.argv[1] in scenes:
        scenes[sys.argv[1]](sys.argv[2], Path(sys.argv[3]))
    else:
        trainer_steps.config = with_adapters
        trainer_steps.main()
