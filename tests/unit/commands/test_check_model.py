import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from refusals import refused
from safetensors.torch import load_file, save_file
from small_qwen2 import MODEL

from megatron_r1 import config as configuration
from megatron_r1.base.errors import Cause, RunError
from megatron_r1.commands import cli
from megatron_r1.commands.check_model import comparisons, reference
from megatron_r1.commands.check_model import verb as check_model
from megatron_r1.commands.check_model.results import NotCompared, ReferenceResult
from megatron_r1.data.tokenizer import load_tokenizer
from megatron_r1.engines.server.errors import EngineError
from megatron_r1.models.hf_config_file import read_hf_config
from megatron_r1.models.support_checks import check_supported
from megatron_r1.models.weights.formats import published_layout
from megatron_r1.models.weights.formats.dequantized_folder import write_dequantized
from megatron_r1.models.weights.formats.hf_folder import HFWeights
from megatron_r1.rehearse.model import write_random_model_folder


@pytest.fixture
def folder(tmp_path):
    """A Qwen2 with a tokenizer of 512 tokens and a chat template."""
    hf_config = {**MODEL, "vocab_size": 512, "eos_token_id": 1, "bos_token_id": 0}
    write_random_model_folder(tmp_path / "model", hf_config, seed=0)
    return tmp_path / "model"


def checked(capsys, *arguments):
    status = cli.main(["check-model", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def rewritten(file, **changes):
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, **changes}))


def test_keys_and_layouts_that_are_not_supported_are_named_at_once(folder, capsys, tmp_path):
    rewritten(folder / "config.json", attn_logit_softcapping=50.0)
    (tmp_path / "found.json").write_text('{"agree": true}')
    status, output = checked(capsys, folder, "--json", tmp_path / "found.json")
    assert status == 2 and "attn_logit_softcapping=50.0" in output
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["agree"] is False and "attn_logit_softcapping=50.0" in found["problem"]
    status, output = checked(capsys, "Org/Model", f"--json={tmp_path / 'other.json'}")
    assert status == 2 and json.loads((tmp_path / "other.json").read_text())["agree"] is False


@pytest.mark.more
def test_missing_and_extra_tensors_are_named(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.self_attn.k_proj.bias"]
    tensors["model.layers.0.self_attn.sinks"] = torch.zeros(2)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with refused("weights", Cause.CONFLICT, "attn.k_proj.bias", "attn.sinks"):
        cli._dispatch_command(["check-model", str(folder)])


def read_all(folder):
    hf_config = read_hf_config(folder, key="HF_FOLDER")
    check_supported(hf_config)
    with HFWeights(folder, hf_config):
        load_tokenizer(str(folder), "HF_FOLDER")


WEIGHTS = "model.safetensors"
SETTINGS = "tokenizer_config.json"
BROKEN = yaml.safe_load(Path(__file__).with_name("broken_folders.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", BROKEN, ids=lambda case: f"{case['key']} {case['cause']}")
def test_what_is_no_model_folder_is_refused(folder, case):
    if "settings" in case:
        rewritten(folder / "config.json", **case["settings"])
    if "missing" in case:
        (folder / case["missing"]).unlink()
    for name, content in case.get("instead", {}).items():
        (folder / name).write_text(content)
    with refused(case["key"], Cause(case["cause"]), *case.get("shows", ())):
        read_all(folder)


def test_a_tokenizer_of_a_model_type_that_transformers_does_not_know_is_loaded(folder):
    rewritten(folder / "config.json", model_type="kimi_k2", auto_map={"AutoConfig": "c.C"})
    assert len(load_tokenizer(str(folder), "HF_FOLDER")) == 512


def rewritten_weights(folder, change):
    tensors = {change(name): tensor for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "change, shown",
    [
        (lambda name: f"base_model.{name}", "base_model.: "),
        (lambda name: name.removeprefix("model."), "model.: "),
        (lambda name: name.replace("mlp", "ffn"), "mlp"),
    ],
)
def test_tensors_of_other_names_are_refused(folder, change, shown):
    rewritten_weights(folder, change)
    hf_config = read_hf_config(folder)
    with HFWeights(folder, hf_config) as weights, refused("weights", Cause.CONFLICT, shown):
        weights.check(with_mtp=True)


def test_a_dtype_that_is_not_read_is_refused_with_what_to_do(folder):
    tensors = load_file(folder / WEIGHTS)
    save_file(
        tensors | {"model.norm.weight": tensors["model.norm.weight"].double()}, folder / WEIGHTS
    )
    shown = "weights", Cause.CONFLICT, "model.norm.weight", "F64", "bfloat16"
    with HFWeights(folder, read_hf_config(folder)) as weights, refused(*shown):
        weights.check(with_mtp=True)


def test_tensors_without_elements_are_no_part_of_a_model(folder):
    tensors = load_file(folder / WEIGHTS)
    save_file(tensors | {"model.layers.0.mlp.shared": torch.zeros(0, 48)}, folder / WEIGHTS)
    with HFWeights(folder, read_hf_config(folder)) as weights:
        weights.check(with_mtp=True)
        assert weights.tensors.keys() == tensors.keys()


@pytest.fixture
def experts(tmp_path):
    """A Qwen3-MoE whose experts have rows of 33 numbers."""
    hf_config = {
        **{**MODEL, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"},
        **{"vocab_size": 512, "head_dim": 32, "n_routed_experts": 4, "num_experts_per_tok": 2},
        **{"moe_intermediate_size": 33, "norm_topk_prob": True, "decoder_sparse_step": 1},
        **{"mlp_only_layers": [], "eos_token_id": 1, "bos_token_id": 0},
    }
    write_random_model_folder(tmp_path / "experts", hf_config, seed=0)
    return tmp_path / "experts"


def test_experts_of_any_width_are_compared(experts, tmp_path):
    found = reference.main(experts, "float32", True, tmp_path / "plain")
    assert found.num_tokens == 512 and len(found.logprobs) == len(found.sequences)


def test_a_token_that_transformers_adds_beyond_the_vocabulary_is_named(folder, tmp_path):
    with refused("tokenizer", Cause.CONFLICT, "Qwen2Tokenizer", "unk_token"):
        reference.main(folder, "float32", True, tmp_path / "plain")
    rewritten(folder / SETTINGS, unk_token="<pad>")
    assert reference.main(folder, "float32", True, tmp_path / "plain").num_tokens == 512


def test_what_transformers_refuses_in_a_configuration_is_named(folder, tmp_path):
    rewritten(folder / SETTINGS, unk_token="<pad>")
    rewritten(folder / "config.json", initializer_range="much")
    with refused("config.json", Cause.MALFORMED, "initializer_range"):
        reference.main(folder, "float32", True, tmp_path / "plain")


@pytest.mark.more
@pytest.mark.parametrize("mtp", ["frozen", "none"])
def test_a_folder_without_mtp_weights_is_checked_without_them(experts, tmp_path, mtp):
    content = json.loads((experts / "config.json").read_text())
    routing = {"n_routed_experts": content.pop("num_experts"), "n_group": 1, "topk_group": 1}
    hf_config = content | {
        **{"architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe", **routing},
        **{"first_k_dense_replace": 0, "n_shared_experts": 1, "routed_scaling_factor": 1.0},
        **{"num_nextn_predict_layers": 1, "tie_word_embeddings": False},
    }
    hf_config["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": 1e4,
        "partial_rotary_factor": 1.0,
    }
    folder = tmp_path / "glm"
    write_random_model_folder(folder, hf_config, seed=0)
    tensors = load_file(folder / WEIGHTS)
    kept = {name: tensor for name, tensor in tensors.items() if ".layers.1." not in name}
    assert len(kept) < len(tensors)
    save_file(kept, folder / WEIGHTS, metadata={"format": "pt"})
    config = configuration.from_overrides({"model.path": str(folder), "model.mtp": mtp})
    found = check_model._run_reference(config, tmp_path / "plain", tmp_path)
    assert found.num_tensors == len(kept)


def test_weights_that_are_no_numbers_are_named(folder, tmp_path):
    tensors = load_file(folder / WEIGHTS)
    tensors["model.norm.weight"][0] = float("nan")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    with refused("weights", Cause.MALFORMED, "model.norm.weight"):
        reference.main(folder, "float32", True, tmp_path / "plain")


def test_quantized_weights_are_compared_as_plain_ones(folder, tmp_path):
    name, block = "model.layers.0.mlp.up_proj.weight", 128
    tensors = load_file(folder / WEIGHTS)
    rows, columns = tensors[name].shape
    scales = torch.rand(-(-rows // block), -(-columns // block)) + 0.5
    codes = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors | {name: codes, f"{name}_scale_inv": scales}, folder / WEIGHTS)
    rewritten(folder / "config.json", quantization_config=published_layout.FP8_CONFIG)
    plain = tmp_path / "plain"
    with HFWeights(folder, read_hf_config(folder)) as weights:
        weights.check(with_mtp=True)
        write_dequantized(weights, plain)
    every = scales.repeat_interleave(block, 0).repeat_interleave(block, 1)[:rows, :columns]
    copied = load_file(plain / WEIGHTS)
    assert copied.keys() == tensors.keys()
    assert torch.equal(copied[name], codes.float() * every)
    assert "quantization_config" not in json.loads((plain / "config.json").read_text())
    assert (plain / "tokenizer.json").is_file()


def test_a_tokenizer_of_another_size_is_named(folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    name = "model.embed_tokens.weight"
    save_file(tensors | {name: tensors[name][:260].clone()}, folder / "model.safetensors")
    rewritten(folder / SETTINGS, unk_token="<pad>")
    rewritten(folder / "config.json", vocab_size=260)
    with refused("tokenizer", Cause.CONFLICT, "vocab_size=260"):
        reference.main(folder, "float32", True, tmp_path / "plain")


@pytest.mark.parametrize(
    "megatron, vllm, status, lines",
    [
        (1e-5, 2e-5, 0, ["Megatron   agrees", "vLLM       agrees"]),
        (1e-5, NotCompared("no vllm", is_failure=False), 0, ["vLLM       NOT RUN: no vllm"]),
        (3e-4, 2e-5, 1, ["Megatron   DIFFERS: max |Δ log p| = 3.0e-04 (at most 1.0e-04)"]),
        (1e-5, 0.3, 1, ["vLLM       DIFFERS"]),
        (
            1e-5,
            NotCompared("the engine ended"),
            1,
            ["vLLM       FAILED: the engine ended"],
        ),
    ],
)
def test_the_exit_status_is_0_only_if_all_agree(
    folder, capsys, monkeypatch, tmp_path, megatron, vllm, status, lines
):
    async def answer(value):
        return value

    found_before = ReferenceResult(15, 512, True, [[1, 2, 3]], [[-1.0, -2.0]], 0.0)
    monkeypatch.setattr(check_model, "_run_reference", lambda *_: found_before)
    monkeypatch.setattr(check_model, "compare_with_megatron", lambda *_: answer(megatron))
    monkeypatch.setattr(check_model, "compare_with_vllm", lambda *_: answer(vllm))
    found, output = checked(capsys, folder, "--json", tmp_path / "found.json")
    assert found == status and all(line in output for line in lines), output
    written = json.loads((tmp_path / "found.json").read_text())
    wanted = vllm if isinstance(vllm, float) else str(vllm)
    assert (written["agree"], written["vllm"]) == (not status, wanted)
    assert ("problem" in written) == bool(status)


def test_without_a_tokenizer_token_ids_decide(folder, capsys, monkeypatch, tmp_path):
    async def agrees():
        return 1e-5

    found = ReferenceResult(15, None, False, [[1, 2, 3]], [[-1.0, -2.0]], 0.0)
    monkeypatch.setattr(check_model, "_run_reference", lambda *_: found)
    monkeypatch.setattr(check_model, "compare_with_megatron", lambda *_: agrees())
    monkeypatch.setattr(check_model, "compare_with_vllm", lambda *_: agrees())
    status, output = checked(capsys, folder, "--json", tmp_path / "found.json")
    assert status == 0, output
    written = json.loads((tmp_path / "found.json").read_text())
    assert written["agree"] is True and "problem" not in written
    assert written["tokens"] is None and written["vllm"] == 1e-5


def test_a_file_that_is_cut_off_is_named_before_anything_starts(folder, capsys):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    status, output = checked(capsys, folder)
    assert status == 2 and str(weights) in output, output


def test_without_vllm_the_engine_is_reported_as_not_run(folder, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "vllm", None)
    none = ReferenceResult(15, None, False, [], [], 0.0)
    answer = asyncio.run(comparisons.compare_with_vllm(tmp_path, None, none, tmp_path))
    assert str(answer).startswith("NOT RUN: ")


class FailingFleet:
    def __init__(self, count, scratch, **settings):
        self.scratch, self.settings = scratch, settings

    async def __aenter__(self):
        return self

    async def __aexit__(self, *exception):
        return None

    async def start(self, folder):
        assert self.settings["max_model_len"] == 64  # MODEL's max_position_embeddings
        (self.scratch / "engine-0.log").write_text("ValueError: head size 40\n")
        raise EngineError("status 500: See stack trace (above)")


def test_why_an_engine_failed_is_read_from_its_log(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(comparisons, "EngineFleet", FailingFleet)
    none, config = ReferenceResult(15, None, False, [], [], 0.0), configuration.from_overrides({})
    rewritten(folder / "config.json", head_dim=32)
    answer = str(asyncio.run(comparisons.compare_with_vllm(folder, config, none, tmp_path)))
    assert answer.startswith("FAILED: status 500") and "ValueError: head size 40" in answer
    rewritten(folder / "config.json", head_dim=40)
    answer = str(asyncio.run(comparisons.compare_with_vllm(folder, config, none, tmp_path)))
    assert "head_dim=40" in answer and str(tmp_path) not in answer


def test_rounding_of_both_sides_is_tolerated():
    assert ReferenceResult(1, None, False, [], [], 0.0).tolerance == 1e-4
    assert ReferenceResult(1, None, False, [], [], 0.02).tolerance == 0.04
    with refused("HF_FOLDER", Cause.NOT_FOUND, "nowhere"):
        check_model.run(None, "nowhere")


def test_a_reference_that_is_killed_is_no_mistake_of_the_user(monkeypatch, tmp_path):
    killed = subprocess.CompletedProcess([], -9, None, "Loading weights: 3 of 9\n")
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: killed)
    with pytest.raises(RunError, match="m: .*SIGKILL"):
        check_model._run_reference(
            configuration.parse_recipe({"model": {"path": "m"}}), tmp_path, tmp_path
        )
