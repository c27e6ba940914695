"""`trainer_steps.py` with adapters: `lora_training.py MODEL OUT GRID…`, or, of another model than
wrote OUT/checkpoint: `lora_training.py refused MODEL OUT`, which writes why to OUT/refused.txt.
"""

import sys
from pathlib import Path

import trainer_steps
from trainer_steps import config

from megatron_r1.config import Config
from megatron_r1.training import distributed

LORA = {"rank": 3, "alpha": 60.0}
"""A large factor, so that two updates move the policy visibly."""


def with_adapters(model: str, grid: str) -> Config:
    tree = config(model, grid).model_dump()
    tree["model"]["lora"] = LORA
    return Config.model_validate(tree)


def refused(model: str, out: Path) -> None:
    from megatron_r1.training.folders import Folders
    from megatron_r1.training.trainer import Trainer

    reasons, recipes = [], (with_adapters(model, "one"), config(model, "one"))
    position = distributed.initialize(recipes[0].parallel, seed=0)
    for settings in recipes:
        try:
            Folders(Trainer(settings, position)).load_checkpoint(str(out / "checkpoint"), True)
        except ValueError as error:
            reasons.append(str(error))
    (out / "refused.txt").write_text("\n".join(reasons))
    distributed.leave_process_groups()


if __name__ == "__main__":
    if sys.argv[1] == "refused":
        refused(sys.argv[2], Path(sys.argv[3]))
    else:
        trainer_steps.config = with_adapters
        trainer_steps.main()
