"""The shape of a model's routing decisions, which engine and trainer exchange for routing replay.
No torch or Megatron."""

from dataclasses import dataclass

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.models.hf_config import HFConfig, require_keys, sparse_layers


@dataclass(frozen=True)
class RoutingShape:
    """The sizes of the routing decisions of a mixture of experts.

    Attributes:
        num_layers: the number of decoder layers.
        moe_layers: indices of the decoder layers with routed experts, among num_layers.
        topk: the number of experts to which each of these layers routes a token.
        num_experts: the routed experts of each of these layers."""

    num_layers: int
    moe_layers: tuple[int, ...]
    topk: int
    num_experts: int

    @property
    def index_bytes(self) -> int:
        """Bytes of one expert's index, unsigned: 1 or 2."""
        return 1 if self.num_experts <= 256 else 2

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's routing: moe layers x topk indices."""
        return len(self.moe_layers) * self.topk * self.index_bytes


def routing_shape(hf_config: HFConfig) -> RoutingShape:
    """Return the routing shape of the model `hf_config`; UserError for one without experts."""
    if not hf_config.get("n_routed_experts"):
        architecture = (hf_config.get("architectures") or ["this model"])[0]
        raise UserError(
            f"rl.routing_replay: {architecture} has no routed experts whose choice could be "
            "replayed; set it to false",
            key="rl.routing_replay",
            cause=Cause.CONFLICT,
        )
    require_keys(hf_config, "num_hidden_layers", "num_experts_per_tok")
    moe_layers = tuple(layer for layer, sparse in enumerate(sparse_layers(hf_config)) if sparse)
    return RoutingShape(
        hf_config["num_hidden_layers"],
        moe_layers,
        hf_config["num_experts_per_tok"],
        hf_config["n_routed_experts"],
    )
