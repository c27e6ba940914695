import pytest

from megatron_r1 import config as configuration
from megatron_r1.config import Config
from megatron_r1.errors import UserError


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {"lora": {"rank": 0}},
            "rank: input should be greater than or equal to 1, got 0",
        ),
        ({"lora": {"alpha": 0}}, "model.lora.alpha: input should be greater than 0, got 0"),
        ({"lora": {"targets": []}}, "model.lora.targets"),
        ({"lora": {"rang": 8}}, "model.lora.rang"),
        ({"lora": {}, "mtp": "train"}, "leave out model.lora or model.mtp: train"),
        ({"lora": {}, "head": "score"}, "leave out model.lora or model.head: score"),
        ({"lora": {}, "init": "random"}, "leave out model.lora or model.init: random"),
        ({"lora": {}, "expert_bias_update_rate": 1e-3}, "model.expert_bias_update_rate"),
    ],
)
def test_what_cannot_be_trained_with_adapters_is_refused_by_name(model, message):
    with pytest.raises(UserError) as refusal:
        configuration.parse({"model": model})
    assert message in str(refusal.value)


def test_a_critic_is_trained_whole():
    config = Config.model_validate({"model": {"lora": {"rank": 8}}})
    assert config.of_critic().model.lora is None
    assert config.model.lora.scale == 4.0
