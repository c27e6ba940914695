"""Compare score models with transformers on these ranks: `score_steps.py ORACLE MODELS OUT GRID…`.

ORACLE is of score_oracle.py, MODELS of oracle.py. Of each score model: the round trip of its
checkpoint, the scores of all texts, both losses and every gradient. Of each language model: the
score model that starts from it. Prints a line per comparison and fails on the first that is off.
"""

import os
import sys
from functools import partial
from pathlib import Path

from megatron_r1.models import platform

platform.prepare_process()

import grids  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from against_transformers import build, report, same_checkpoint, same_gradients  # noqa: E402
from megatron.core import dist_checkpointing, parallel_state  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from scored_models import LABELS, models_on  # noqa: E402

from megatron_r1 import models  # noqa: E402
from megatron_r1.config import ParallelConfig  # noqa: E402
from megatron_r1.controller.trainer_calls.packing import pack_samples  # noqa: E402
from megatron_r1.models import weights  # noqa: E402
from megatron_r1.trainer import distributed, reward_losses  # noqa: E402
from megatron_r1.trainer.checkpoints.contents import without_extra_state  # noqa: E402
from megatron_r1.trainer.metrics import merge_reports, reduce_over_data  # noqa: E402
from megatron_r1.trainer.output_heads import ScoreHeadOutput  # noqa: E402
from megatron_r1.trainer.passes import run_passes  # noqa: E402
from megatron_r1.trainer.sequence_packing import pack_batch  # noqa: E402
from megatron_r1.trainer.token_split import TokenSplit  # noqa: E402
from megatron_r1.trainer.training_sample import Sample  # noqa: E402

# fp32 and another order of sums; scores have a standard deviation of 1.
SCORE_TOLERANCE = 2e-5
LOSS_TOLERANCE = 5e-6


def own_batches(texts, grid_position, sizes):
    """This rank's micro-batches, spread as the controller does, and the texts in each."""
    samples = [
        Sample.pack(ids[0].tolist(), [], label=label)
        for ids, label in zip(texts, LABELS, strict=True)
    ]
    lengths = [len(sample) for sample in samples]
    plan = pack_samples(lengths, grid_position.data_parallel_size, 60, samples_per_unit=2).shares[
        grid_position.data_rank
    ]
    plan += [[]] * (-len(plan) % sizes["pp"])
    context = parallel_state.get_context_parallel_rank()
    split = TokenSplit(tensor_size=sizes["tp"], context_size=sizes["cp"], context_rank=context)
    device = torch.device("cpu")
    return [pack_batch([samples[i] for i in m], split, device) for m in plan], plan


def seen(batch, out):
    return ScoreHeadOutput(batch, out.view(-1), parallel_state.get_context_parallel_group())


def keep_scores(batch, out):
    return seen(batch, out).last_token_scores()


def compute(loss, batch, out):
    return loss(batch, seen(batch, out), {})


def compare(name, grid, sizes, grid_position, oracle, out):
    folder = oracle / name
    answers, texts = torch.load(folder / "answers.pt"), torch.load(oracle / "texts.pt")
    hf_config = models.read_hf_config(folder, None)
    chunks = build(hf_config, sizes)
    weights.load_hf(chunks, hf_config, folder)
    same_checkpoint(name, hf_config, grid, chunks, folder, out)
    batches, plan = own_batches(texts, grid_position, sizes)
    with torch.no_grad():
        found = run_passes(chunks, batches, keep_scores, forward_only=True)
    pairs = zip(plan, found, strict=True) if grid_position.is_last_stage else []
    gaps = [(got - answers["scores"][members]).abs().max() for members, got in pairs if members]
    report(name, grid, "scores", max(gaps, default=0.0), SCORE_TOLERANCE)
    for loss in (reward_losses.pairwise, reward_losses.pointwise):
        for chunk in chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        reports = run_passes(chunks, batches, partial(compute, loss), forward_only=False)
        metrics = reduce_over_data(grid_position, merge_reports(reports))
        gap = abs(metrics["loss"] - answers[loss.__name__]) if metrics else 0.0
        report(name, grid, f"{loss.__name__} loss", gap, LOSS_TOLERANCE)
        same_gradients(name, hf_config, grid, chunks, folder / loss.__name__, out)


def started(name, grid, sizes, models_folder, out):
    """The body is the language model's, bit for bit; the head is the same on every grid."""
    folder = models_folder / name
    own = models.read_hf_config(folder)
    hf_config = models.read_hf_config(folder, "score")
    chunks = build(hf_config, sizes)
    weights.load_hf(chunks, hf_config, folder, own)
    weights.initialize_score_head(chunks, hf_config, std=0.5, seed=3)
    weights.save_hf(chunks, hf_config, folder, out / "started", torch.float32)
    if dist.get_rank() == 0:
        got = load_file(out / "started/model.safetensors")
        before = load_file(folder / "model.safetensors")
        head = got.pop("score.weight")
        assert all(torch.equal(got[key], before[key]) for key in got), f"{name} at {grid}"
        heads = ("lm_head.", f"model.layers.{hf_config['num_hidden_layers']}.")
        missing = [key for key in before.keys() - got.keys() if not key.startswith(heads)]
        assert not missing, missing
        assert 0.3 < head.std() < 0.7 and head.shape == (1, hf_config["hidden_size"])
        drawn = out / f"{name}_head.pt"
        if drawn.exists():
            assert torch.equal(torch.load(drawn), head), f"{name} at {grid}: another head"
        torch.save(head, drawn)
        print(f"{name} {grid} starts from a language model", flush=True)
    dist.barrier()
    if sizes["pp"] == 1:
        from_megatron(own, hf_config, sizes, chunks, folder, out / f"{name}_{grid}_language")


def from_megatron(own, hf_config, sizes, chunks, folder, saved):
    """The same from a Megatron checkpoint of the language model; a score model's is recognized."""
    (language,) = build(own, sizes)
    weights.load_hf([language], own, folder)
    save(language, saved)
    (other,) = build(hf_config, sizes)
    with torch.no_grad():
        other.module.score.weight.copy_(chunks[0].module.score.weight)
    weights.load_megatron([other], hf_config, saved, own)
    (scored,), again = chunks, saved.with_name(saved.name + "_scored")
    save(scored, again)
    (third,) = build(hf_config, sizes)
    weights.load_megatron([third], hf_config, again)
    for name, parameter in scored.named_parameters():
        for model in (other, third):
            assert torch.equal(dict(model.named_parameters())[name], parameter), name
    try:
        weights.load_megatron([third], hf_config, saved)
    except ValueError as error:
        assert "it lacks score.weight" in str(error), error
    else:
        raise AssertionError("a language model was taken for a score model")


def save(model, folder):
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    entries = model.module.sharded_state_dict(metadata={"dp_cp_group": group})
    if dist.get_rank() == 0:
        folder.mkdir()
    dist.barrier()
    dist_checkpointing.save({"model": without_extra_state(entries)}, str(folder))
    dist.barrier()


def main(oracle: Path, models_folder: Path, out: Path, names: list[str]) -> None:
    for grid in names:
        sizes = grids.sizes(grid, with_mtp=False)
        for name in models_on(grid, int(os.environ["WORLD_SIZE"])):
            settings = grids.parallel_settings(grid, with_mtp=False)
            grid_position = distributed.initialize(ParallelConfig.model_validate(settings), seed=1)
            compare(name, grid, sizes, grid_position, oracle, out)
            started(name, grid, sizes, models_folder, out)
            parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), sys.argv[4:])
