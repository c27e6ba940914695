"""`tests/parallel/shared_steps.py` with Transformer Engine's modules, its attention among them, on
null GPUs, one a rank: `shared_on_null_gpu.py FOLDER GRID NAME…`, under torchrun.

Attention is Transformer Engine's own plain products with its own masks; its kernels run nowhere."""

from trainer_on_null_gpu import accumulating, compute_on_host

from megatron_r1.config import Config


def main() -> None:
    compute_on_host(our_attention=False)
    import shared_steps

    fused = accumulating(shared_steps.config)

    def config(model: str, grid: str) -> Config:
        settings = fused(model, grid).model_dump()
        settings["model"]["attention_backend"] = "unfused"
        return Config.model_validate(settings)

    shared_steps.config = config
    shared_steps.main()


if __name__ == "__main__":
    main()
